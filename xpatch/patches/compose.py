"""Patch sets from patch sets: some edits of one, or two as one.

What an edit takes with it. A row (neuron or rank) belongs to the edit that names it in its record. Rows without an owner stay
with every selection. A part that edits name with `()` is shared by them as a whole, and edits of one group share their parts:
they stay together or go together. A part no edit names may serve any edit: from a set with such a dense delta nothing can be
taken, and with such rows no edit that owns nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from xpatch.errors import ConflictError, MismatchError
from xpatch.patches import ledger
from xpatch.patches.forms import DenseDelta, Gate, LanguageMask, LowRankDelta, Part, PatchNeurons
from xpatch.patches.identity import BaseIdentity, first_difference

if TYPE_CHECKING:
    from xpatch.patches.types import EditRecord, PatchSet

Ownership = Literal["empty", "bare", "owned", "shared"]


def select(patches: PatchSet, ids: str | Iterable[str]) -> PatchSet:
    """The edits named, in the set's order, with their rows (in their order) and every row no edit owns.

    A part left without rows goes, and so do masks and gates that only such parts named.
    Raises `MismatchError` for an unknown id, `ConflictError` when a kept and a left edit share a part.
    """
    kept = _known(patches, ids)
    _check_separable(patches, kept)
    owners, ownership = ledger.owners(patches), part_ownership(patches)
    parts: dict[str, Part] = {}
    place: dict[str, dict[int, int]] = {}
    for name, part in patches.parts.items():
        if ownership[name] == "shared":
            if any(name in record.rows for record in patches.edits if record.id in kept):
                parts[name] = part
            continue
        rows = [row for row, owner in enumerate(owners[name]) if owner is None or owner in kept]
        if len(rows) == part.count:
            parts[name] = part
        elif rows:
            parts[name] = _rows_of(part, rows)
        place[name] = {row: index for index, row in enumerate(rows)}
    edits = tuple(_renumbered(record, parts, place) for record in patches.edits if record.id in kept)
    lost = [part for name, part in patches.parts.items() if name not in parts]
    still = {*(part.mask for part in parts.values())}, {*(part.gate for part in parts.values())}
    gone = {part.mask for part in lost} - still[0], {part.gate for part in lost} - still[1]
    masks = {name: mask for name, mask in patches.masks.items() if name not in gone[0]}
    gates = {name: gate for name, gate in patches.gates.items() if name not in gone[1]}
    return replace(patches, parts=parts, edits=edits, masks=masks, gates=gates)


def drop(patches: PatchSet, ids: str | Iterable[str]) -> PatchSet:
    """Every edit but those named; see `select`."""
    left = _known(patches, ids)
    return select(patches, [record.id for record in patches.edits if record.id not in left])


def add(first: PatchSet, second: PatchSet) -> PatchSet:
    """Both sets as one: parts, rows and ledger lines of `first`, then those of `second`.

    A part of `second` is appended to the first part of the same form, site, activation, mask and gate whose rows are owned in
    the same way (a threshold gate looks at the output of a whole part, so its parts stay apart); other parts stay separate
    and are renamed where their name is taken ("neurons.1"), as are groups. Masks and gates of one name must be equal.
    The name stays when both have it. Raises `ConflictError` for a shared edit id or an unequal mask or gate, `MismatchError`
    for different bases or widths.
    """
    repeated = {record.id for record in first.edits}.intersection(record.id for record in second.edits)
    if repeated:
        raise ConflictError(
            f"both patch sets hold the edits {_listed(repeated)}; edit ids must be unique; "
            "drop them from one set: a + b.drop([...])"
        )
    masks = _merged(dict(first.masks), dict(second.masks), "mask")
    gates = _merged(dict(first.gates), dict(second.gates), "gate")
    ownership, incoming = part_ownership(first), part_ownership(second)
    parts = dict(first.parts)
    renamed: dict[str, str] = {}
    offset: dict[str, int] = {}
    for name, part in second.parts.items():
        _check_widths(first, name, part)
        host = next((h for h in first.parts if _joins(parts[h], part, ownership[h], incoming[name], gates)), None)
        if host is None:
            taken = set(parts) | (set(second.parts) - {name})
            renamed[name], offset[name] = _free(name, taken, part.form), 0
            parts[renamed[name]] = part
        else:
            renamed[name], offset[name] = host, parts[host].count
            parts[host] = _joined(parts[host], part)
            ownership[host] = incoming[name] if ownership[host] == "empty" else ownership[host]
    groups = _regrouped(first, second)
    edits = list(first.edits)
    for record in second.edits:
        rows: dict[str, tuple[int, ...]] = {}
        for name, owned in record.rows.items():
            rows[renamed[name]] = rows.get(renamed[name], ()) + tuple(row + offset[name] for row in owned)
        edits.append(replace(record, rows=rows, group=groups[record.group] if record.group else None))
    base = _common_base(first.base, second.base)
    name_kept = first.name if first.name == second.name else None
    return replace(first, parts=parts, edits=tuple(edits), masks=masks, gates=gates, base=base, name=name_kept)


def part_ownership(patches: PatchSet) -> dict[str, Ownership]:
    """Part name -> "owned" (edits own rows of it), "shared" (edits name it as a whole), "bare" (none does), "empty"."""
    named_by: dict[str, list[tuple[int, ...]]] = {}
    for record in patches.edits:
        for name, rows in record.rows.items():
            named_by.setdefault(name, []).append(rows)
    result: dict[str, Ownership] = {}
    for name, part in patches.parts.items():
        named = named_by.get(name, [])
        if part.count == 0 and not isinstance(part, DenseDelta):
            result[name] = "empty"
        else:
            result[name] = "owned" if any(named) else "shared" if named else "bare"
    return result


def _known(patches: PatchSet, ids: str | Iterable[str]) -> set[str]:
    return {ledger.find(patches, id).id for id in ([ids] if isinstance(ids, str) else ids)}


def _check_separable(patches: PatchSet, kept: set[str]) -> None:
    left = [record for record in patches.edits if record.id not in kept]
    ownership = part_ownership(patches)
    bonds: dict[str, list[EditRecord]] = {}
    for record in patches.edits:
        if record.group:
            bonds.setdefault(f"belong to group {record.group!r}", []).append(record)
        for name in record.rows:
            if ownership[name] == "shared":
                bonds.setdefault(f"share part {name!r}", []).append(record)
    for bond, records in bonds.items():
        stay = [record.id for record in records if record.id in kept]
        go = [record.id for record in records if record.id not in kept]
        if stay and go:
            raise ConflictError(
                f"edits {_listed(stay)} and {_listed(go)} {bond} and cannot be separated; "
                "keep or drop all of them, or train the edits you want again"
            )
    for name in (name for name, state in ownership.items() if state == "bare"):
        whole = isinstance(patches.parts[name], DenseDelta)
        serving = [record.id for record in left if may_own(record, ownership, whole=whole)]
        if serving:
            raise ConflictError(
                f"edits {_listed(serving)} cannot be taken from this set: part {name!r} at {patches.parts[name].site!r} has no "
                "owner and may serve them; train the edits you want again, or name the part in the records of the edits it serves"
            )


def may_own(record: EditRecord, ownership: dict[str, Ownership], *, whole: bool) -> bool:
    """Whether a part without an owner (`whole`: a dense delta, else one with rows) may serve this edit."""
    owns = any(rows or ownership[name] == "shared" for name, rows in record.rows.items())
    served = record.group is not None or record.status not in ("already-right", "rejected")
    return (whole and owns) or (not owns and served)


def _rows_of(part: Part, rows: list[int]) -> Part:
    if isinstance(part, PatchNeurons):
        return replace(part, keys=part.keys[rows], bias=part.bias[rows], values=part.values[rows])
    if isinstance(part, LowRankDelta):
        return replace(part, down=part.down[rows], up=part.up[:, rows])
    return part


def _renumbered(record: EditRecord, parts: dict[str, Part], place: dict[str, dict[int, int]]) -> EditRecord:
    rows = {
        name: tuple(place.get(name, {})[row] for row in owned) for name, owned in record.rows.items() if name in parts
    }
    return record if rows == dict(record.rows) else replace(record, rows=rows)


def _joins(host: Part, part: Part, host_state: Ownership, state: Ownership, gates: dict[str, Gate]) -> bool:
    same = all(
        getattr(host, key, None) == getattr(part, key, None) for key in ("form", "site", "activation", "mask", "gate")
    )
    gate = gates[part.gate] if same and part.gate else None
    if not same or isinstance(part, DenseDelta) or (gate is not None and gate.kind == "threshold"):
        return False
    return {host_state, state} in ({"owned"}, {"bare"}, {"empty"}, {"owned", "empty"})


def _joined(host: Part, part: Part) -> Part:
    if isinstance(host, PatchNeurons) and isinstance(part, PatchNeurons):
        both: dict[str, Any] = {key: torch.cat((getattr(host, key), getattr(part, key))) for key in host.tensor_fields}
        return replace(host, **both)
    if isinstance(host, LowRankDelta) and isinstance(part, LowRankDelta):
        return replace(host, down=torch.cat((host.down, part.down)), up=torch.cat((host.up, part.up), dim=1))
    return host


def _check_widths(first: PatchSet, name: str, part: Part) -> None:
    for other_name, other in first.parts.items():
        same_place = other.site == part.site and isinstance(other, PatchNeurons) == isinstance(part, PatchNeurons)
        if same_place and other.widths != part.widths:
            raise MismatchError(
                f"parts {other_name!r} and {name!r} at {part.site!r} differ in width: expected {other.widths} (in, out), "
                f"found {part.widths}; the sets were made for different models"
            )


def _merged(first: dict[str, Any], second: dict[str, Any], word: str) -> dict[str, Any]:
    for name in first.keys() & second.keys():
        if not _equal(first[name], second[name]):
            raise ConflictError(
                f"{word} {name!r} differs between the two patch sets; {word}s of one name must be equal; "
                "apply the sets under two names, or train one of them with the other's"
            )
    return {**first, **second}


def _equal(first: LanguageMask | Gate, second: LanguageMask | Gate) -> bool:
    plain = all(getattr(first, key, None) == getattr(second, key, None) for key in ("languages", "kind", "threshold"))
    one, two = first.tensors, second.tensors
    return plain and one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _common_base(first: BaseIdentity | None, second: BaseIdentity | None) -> BaseIdentity | None:
    if first is None or second is None:
        return first or second
    difference = first_difference(first, second)
    if difference is not None:
        raise MismatchError(f"the patch sets were made for different bases: {difference}; apply each to its own model")
    return first.model_copy(update={"touched": {**second.touched, **first.touched}})


def _regrouped(first: PatchSet, second: PatchSet) -> dict[str, str]:
    taken = {record.group for record in first.edits if record.group}
    groups: dict[str, str] = {}
    own = list(dict.fromkeys(record.group for record in second.edits if record.group))
    for group in own:
        groups[group] = _free(group, taken | (set(own) - {group}), group)
        taken.add(groups[group])
    return groups


def _free(name: str, taken: set[str], stem: str) -> str:
    if name not in taken:
        return name
    return next(f"{stem}.{index}" for index in range(1, len(taken) + 2) if f"{stem}.{index}" not in taken)


def _listed(ids: Iterable[str]) -> str:
    names = sorted(ids)
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
