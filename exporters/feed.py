"""From patch sets to the tensors of a graph's slots: what fits, and several sets side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xpatch.errors import ConflictError, MismatchError
from xpatch.exporters.description import OnnxBase
from xpatch.exporters.slots import Slot
from xpatch.patches.identity import first_difference
from xpatch.patches.types import DenseDelta, LanguageMask, LowRankDelta, PatchNeurons, PatchSet

Array = np.ndarray[Any, Any]
MaskRows = dict[str, tuple[Array, Array]]  # language -> inner [D_in], outer [D_out]


@dataclass(frozen=True)
class Feed:
    """Graph inputs that stand for one patch set or several at once.

    tensors: graph input name -> array. languages: of mask rows 1, 2, ...; row 0, for every other language, is ones.
    counts: for each set, slot prefix -> its part names with their numbers of neurons (or ranks), in the order of the tensors.
    """

    tensors: dict[str, Array] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    counts: tuple[dict[str, list[tuple[str, int]]], ...] = ()


def check_fit(patches: PatchSet, base: OnnxBase, allow: Iterable[str] = ()) -> None:
    """Check that a set was made for the exported model and that its parts have slots there.

    allow: identity checks to leave out, as in `xpatch.apply`. Raises `MismatchError`: expected, found, what to do.
    """
    if patches.base is not None:
        difference = first_difference(patches.base, base.identity, allow=allow)
        if difference is not None:
            raise MismatchError(f"the patches do not fit this exported base: {difference}")
    for name, part in patches.parts.items():
        where = f"part {name!r} at {part.site!r}"
        if isinstance(part, DenseDelta):
            raise MismatchError(
                f"{where}: a dense delta changes all {part.weight.numel()} weights of a layer and has no slot in an exported base; "
                "edit with a method that makes neurons or low-rank deltas (t-patcher, mpn), or export a base with the weights merged"
            )
        if part.gate is not None:
            raise MismatchError(
                f"{where}: it acts only through gate {part.gate!r}, and exported bases have no gates; serve it with PyTorch"
            )
        slot = _slot_of(part, base, where)
        if slot.activation is not None and isinstance(part, PatchNeurons) and part.activation != slot.activation:
            raise MismatchError(
                f"{where}: expected activation {slot.activation!r}, which the exported base has, found {part.activation!r}; "
                f"export a base with activation={part.activation!r} (`xpatch export base --activation {part.activation}`)"
            )
        if part.widths != (slot.width_in, slot.width_out):
            raise MismatchError(
                f"{where}: expected widths {(slot.width_in, slot.width_out)}, found {part.widths}; it is for another model"
            )
        if part.mask is not None:
            _check_mask(patches.masks[part.mask], slot, base, where)


def fill(sets: Sequence[PatchSet], base: OnnxBase) -> Feed:
    """The tensors that make the graph compute the base plus all `sets` (checked before with `check_fit`), neurons side by side.

    Raises `ConflictError` where parts of one slot have different language masks: a slot has one.
    """
    tensors: dict[str, Array] = {}
    counts: tuple[dict[str, list[tuple[str, int]]], ...] = tuple({} for _ in sets)
    masks: dict[str, MaskRows] = {}
    for slot in base.slots:
        parts = [
            (index, name, part, patches)
            for index, patches in enumerate(sets)
            for name, part in patches.parts.items()
            if part.form == slot.kind and part.site == slot.site
        ]
        if not parts:
            continue
        for index, name, part, _ in parts:
            counts[index].setdefault(slot.prefix, []).append((name, part.count))
        tensors |= _side_by_side(slot, [part for _, _, part, _ in parts])
        groups = [_mask_rows(patches.masks[part.mask]) if part.mask else {} for _, _, part, patches in parts]
        if any(not _same(groups[0], other) for other in groups):
            owners = ", ".join(f"{name!r} of set {patches.name or index!r}" for index, name, _, patches in parts)
            raise ConflictError(
                f"slot {slot.site!r} has one group of language masks, but these parts have different ones: {owners}; "
                "serve the sets one at a time, or with PyTorch"
            )
        masks[slot.prefix] = groups[0]
    languages = base.languages or tuple(dict.fromkeys(language for rows in masks.values() for language in rows))
    for slot in base.slots:
        rows = masks.get(slot.prefix)
        if rows:
            ones = np.ones(slot.width_in, np.float32), np.ones(slot.width_out, np.float32)
            chosen = [ones, *(rows.get(language, ones) for language in languages)]
            tensors[slot.name("mask_inner")] = np.stack([inner for inner, _ in chosen])
            tensors[slot.name("mask_outer")] = np.stack([outer for _, outer in chosen])
    return Feed(tensors=tensors, languages=languages if any(masks.values()) else (), counts=counts)


def selection(feed: Feed, base: OnnxBase, keep: Array) -> dict[str, Array]:
    """keep `[B, sets]` (which rows of a batch get which set) -> the select input `[B, N]` of every slot in use."""
    found = {}
    for slot in base.slots:
        columns = [
            np.repeat(keep[:, index : index + 1], sum(count for _, count in parts[slot.prefix]), axis=1)
            for index, parts in enumerate(feed.counts)
            if slot.prefix in parts
        ]
        if columns:
            found[slot.name("select")] = np.concatenate(columns, axis=1).astype(np.float32)
    return found


def _slot_of(part: PatchNeurons | LowRankDelta, base: OnnxBase, where: str) -> Slot:
    for slot in base.slots:
        if slot.kind == part.form and slot.site == part.site:
            return slot
    there = ", ".join(f"{slot.kind} at {slot.site}" for slot in base.slots)
    option = "sites" if part.form == "neurons" else "linears"
    raise MismatchError(
        f"{where}: the exported base has no {part.form} slot there, only {there}; export it with {option}=[{part.site!r}]"
    )


def _check_mask(mask: LanguageMask, slot: Slot, base: OnnxBase, where: str) -> None:
    if not slot.masked:
        raise MismatchError(
            f"{where}: it has language masks, but the base was exported without them; export it again with languages=None"
        )
    unknown = [language for language in mask.languages if base.languages is not None and language not in base.languages]
    if unknown:
        raise MismatchError(
            f"{where}: its masks name {', '.join(unknown)}, but the base was exported for {', '.join(base.languages or ())}; "
            "export the base with these languages too"
        )


def _side_by_side(slot: Slot, parts: Sequence[Any]) -> dict[str, Array]:
    arrays: dict[str, list[Array]] = {}
    for part in parts:
        if slot.kind == "neurons":
            own = {"keys": part.keys.T, "bias": part.bias, "values": part.values}
        else:
            own = {"down": part.down.T, "up": part.up.T}
        for key, tensor in own.items():
            arrays.setdefault(key, []).append(tensor.numpy())
    axis = {"keys": 1, "down": 1}
    return {
        slot.name(key): np.ascontiguousarray(np.concatenate(values, axis=axis.get(key, 0)), dtype=np.float32)
        for key, values in arrays.items()
    }


def _mask_rows(mask: LanguageMask) -> MaskRows:
    return {language: (mask.inner[i].numpy(), mask.outer[i].numpy()) for i, language in enumerate(mask.languages)}


def _same(one: MaskRows, other: MaskRows) -> bool:
    pairs = [(one[language], other[language]) for language in one if language in other]
    return one.keys() == other.keys() and all(
        np.array_equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True)
    )
