"""`.onnx_adapter`: a patch set in ONNX Runtime's own adapter format, for any of its language bindings (1.20 and newer).

ONNX Runtime checks neither the content of an adapter nor which model it is for. The unused tensor `xpatch_meta` (uint8) holds
what is needed to do so: the set's config with its fingerprint, base and ledger, and which columns belong to which part.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from xpatch.errors import FormatError, XpatchError
from xpatch.exporters._backend import require
from xpatch.exporters.description import read_base
from xpatch.exporters.feed import Array, check_fit, fill
from xpatch.exporters.slots import META, Slot
from xpatch.patches.config import PatchConfig, config_json, parse_config
from xpatch.patches.store import load
from xpatch.patches.types import EditRecord, LanguageMask, LowRankDelta, PatchNeurons, PatchSet

FORMAT_VERSION = 1
SUFFIX = ".onnx_adapter"


class AdapterMeta(BaseModel):
    """What `xpatch_meta` holds as UTF-8 JSON. config: the text of the set's `patch_config.json`. slots: those it fills, with
    their parts and numbers of neurons (or ranks). languages: of the mask rows after the row of ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    config: str
    slots: list[tuple[Slot, list[tuple[str, int]]]]
    languages: tuple[str, ...] = ()


def export_adapter(
    patches: PatchSet | str | Path, base_folder: str | Path, out: str | Path, *, allow: Iterable[str] = ()
) -> Path:
    """Write a patch set (or the patch folder of one) as an adapter for the base exported to `base_folder`; return its path.

    out: the file, by custom with the ending `.onnx_adapter`. allow: identity checks to leave out, as in `xpatch.apply`.
    The file is written beside its place, read back, and renamed. Raises `MismatchError` for a set that is for another base, has
    another activation, or holds forms without a slot; `ConflictError` for parts of one slot with different masks.
    """
    ort = require("onnxruntime")
    base = read_base(base_folder)
    patches = patches if isinstance(patches, PatchSet) else load(patches)
    check_fit(patches, base, allow=allow)
    used = {part.mask for part in patches.parts.values()}
    patches = dataclasses.replace(patches, masks={k: v for k, v in patches.masks.items() if k in used}, gates={})
    feed = fill([patches], base)
    meta = AdapterMeta(
        version=FORMAT_VERSION,
        config=config_json(patches, name=patches.name),
        slots=[(slot, feed.counts[0][slot.prefix]) for slot in base.slots if slot.prefix in feed.counts[0]],
        languages=feed.languages,
    )
    arrays = {**feed.tensors, META: np.frombuffer(meta.model_dump_json().encode(), np.uint8).copy()}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(FORMAT_VERSION)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    out = Path(out)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        if out.is_dir():
            raise XpatchError(f"{out} is a folder; name a file for the adapter, such as {out / ('patches' + SUFFIX)}")
        out.parent.mkdir(parents=True, exist_ok=True)
        adapter.export_adapter(str(temporary))
        read_adapter(temporary)
        temporary.replace(out)
    except (OSError, RuntimeError) as error:
        raise XpatchError(f"{out} cannot be written: {error}; name a file in a folder you may write to") from None
    finally:
        temporary.unlink(missing_ok=True)
    return out


def read_adapter(path: str | Path) -> PatchSet:
    """The patch set in an adapter that `export_adapter` wrote: same tensors, ledger and fingerprint.

    Raises `FormatError` for a file that is damaged, was changed, or is an adapter of something else.
    """
    ort = require("onnxruntime")
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"adapter {path} does not exist; write one with `xpatch export adapter`")
    try:
        parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        arrays: dict[str, Array] = {name: value.numpy().copy() for name, value in parameters.items()}
    except Exception as error:  # ONNX Runtime raises bare RuntimeError and its own types
        first = str(error).strip().splitlines()[0][-160:]
        raise FormatError(
            f"adapter {path} is damaged or not an ONNX Runtime adapter ({first}); export it again"
        ) from None
    if META not in arrays:
        raise FormatError(
            f"adapter {path} has no {META!r}, so it was not written by xpatch; export one with `xpatch export adapter`"
        )
    try:
        meta = AdapterMeta.model_validate_json(arrays.pop(META).tobytes())
        if meta.version != FORMAT_VERSION:
            raise FormatError(
                f"adapter {path}: expected version {FORMAT_VERSION}, found {meta.version}; export it again with this xpatch"
            )
        config = parse_config(meta.config, where=f"adapter {path}")
        patches = _restore(meta, config, arrays)
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError, KeyError, IndexError, ValueError) as error:
        raise FormatError(f"adapter {path} is damaged: {str(error).splitlines()[0][:160]}; export it again") from None
    if arrays:
        raise FormatError(
            f"adapter {path} holds tensors its description does not name: {', '.join(sorted(arrays))}; export it again"
        )
    if patches.fingerprint != config.fingerprint:
        raise FormatError(
            f"adapter {path}: its content does not match its fingerprint (expected {config.fingerprint[:12]}, found "
            f"{patches.fingerprint[:12]}); it was damaged or changed after export: export it again"
        )
    return patches


def _restore(meta: AdapterMeta, config: PatchConfig, arrays: dict[str, Array]) -> PatchSet:
    parts: dict[str, PatchNeurons | LowRankDelta] = {}
    masks: dict[str, LanguageMask] = {}
    for slot, members in meta.slots:
        own = {key: torch.from_numpy(arrays.pop(slot.name(key))) for key in slot.tensors if slot.name(key) in arrays}
        start = 0
        for name, count in members:
            about: Any = config.parts[name]
            rows = slice(start, start + count)
            start += count
            shared: dict[str, Any] = {"site": about.site, "mask": about.mask}
            if slot.kind == "neurons":
                keys, bias, values = own["keys"][:, rows].T, own["bias"][rows], own["values"][rows]
                parts[name] = PatchNeurons(**shared, keys=keys, bias=bias, values=values, activation=about.activation)
            else:
                parts[name] = LowRankDelta(**shared, down=own["down"][:, rows].T, up=own["up"][rows].T)
            if about.mask is not None:
                languages = config.masks[about.mask].languages
                chosen = [1 + meta.languages.index(language) for language in languages]
                masks[about.mask] = LanguageMask(tuple(languages), own["mask_inner"][chosen], own["mask_outer"][chosen])
    edits = tuple(
        EditRecord(**{key: getattr(edit, key) for key in type(edit).model_fields if key != "rows"}, rows=edit.rows)  # type: ignore[arg-type]
        for edit in config.edits
    )
    ordered = {name: parts[name] for name in config.parts}
    return PatchSet(
        parts=ordered,
        edits=edits,
        masks={name: masks[name] for name in config.masks},
        base=config.base,
        name=config.name,
    )
