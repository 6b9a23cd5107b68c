"""What must hold of a set that was loaded, checked against its files with other code than the loader's."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .fuzz_files import CONFIG, TENSORS

if TYPE_CHECKING:
    import xpatch

_PLAIN = re.compile(r"[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*")
_AXES: dict[str, dict[str, tuple[str, ...]]] = {
    "neurons": {"keys": ("n", "d"), "bias": ("n",), "values": ("n", "d")},
    "lowrank": {"down": ("n", "i"), "up": ("o", "n")},
    "dense": {"weight": ("o", "i"), "bias": ("o",)},
}


def faults(patches: xpatch.PatchSet, files: Mapping[str, bytes], limits: xpatch.Limits) -> list[str]:
    """What is wrong with a set that `xpatch.load(files, limits=limits)` returned; empty where nothing is.

    1. No key occurs twice in the JSON of either file.
    2. Every tensor is fp32, finite, of the shape the config names, and has the very bytes the header points at; the header
       names exactly these, and their places cover the file without gap or overlap.
    3. The fingerprint, computed anew from the loaded value, is the one in the config and the one in the tensor file.
    4. The axes of each part's tensors agree; masks and gates exist and fit.
    5. Edit ids are unique; each row in the ledger exists and has one owner.
    6. Names of parts, masks and gates are plain; the set's name is safe as a file name; all text is whole Unicode, all numbers finite.
    7. No limit is exceeded.
    """
    found: list[str] = []
    config = json.loads(files[CONFIG].decode("utf-8-sig"), object_pairs_hook=lambda pairs: _once(pairs, found))
    content = content_of(patches)
    found += _tensor_faults(patches, files[TENSORS], config)
    fingerprint = value_fingerprint(content, patches)
    if not patches.fingerprint == config["fingerprint"] == fingerprint:
        found.append(
            f"fingerprint {fingerprint[:12]}, config says {config['fingerprint'][:12]}, set {patches.fingerprint[:12]}"
        )
    found += (
        _part_faults(patches) + _ledger_faults(patches) + _name_faults(patches) + _limit_faults(patches, files, limits)
    )
    try:
        times = [(edit.created, edit.seconds) for edit in patches.edits]
        json.dumps([content, patches.name, times], ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        found.append(f"text or number: {error}")
    return found


def content_of(patches: xpatch.PatchSet) -> dict[str, Any]:
    """The value as the JSON its fingerprint is taken over, without what equals its default."""
    content: dict[str, Any] = {
        "format_version": 1,
        "parts": {name: _part(part) for name, part in patches.parts.items()},
    }
    content["masks"] = {
        name: {"languages": list(mask.languages), "tensors": _shapes(mask)} for name, mask in patches.masks.items()
    }
    content["gates"] = {
        name: _some({"kind": gate.kind, "threshold": gate.threshold, "tensors": _shapes(gate) or None})
        for name, gate in patches.gates.items()
    }
    content["edits"] = [_edit(edit) for edit in patches.edits]
    if patches.base is not None:
        base = vars(patches.base)
        weights = {key: vars(value) for key, value in base.items() if hasattr(value, "fp32")}
        touched = {name: vars(value) for name, value in base["touched"].items()} or None
        labels = None if base["id2label"] is None else {str(key): text for key, text in base["id2label"].items()}
        content["base"] = _some({**base, **weights, "touched": touched, "id2label": labels})
    return {key: value for key, value in content.items() if value or key == "parts"}


def value_fingerprint(content: Mapping[str, Any], patches: xpatch.PatchSet) -> str:
    """The fingerprint of a value whose `content_of` is at hand."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(patches.tensors.items()):
        array = tensor.numpy()
        digest.update(f"\n{name} {list(array.shape)}\n".encode() + array.astype("<f4").tobytes())
    return digest.hexdigest()


def _once(pairs: list[tuple[str, Any]], found: list[str]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        found.append("a key occurs twice")
    return dict(pairs)


def _tensor_faults(patches: xpatch.PatchSet, data: bytes, config: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin], object_pairs_hook=lambda pairs: _once(pairs, found))
    if header.pop("__metadata__", {}).get("xpatch_fingerprint") != config["fingerprint"]:
        found.append("the tensor file bears another fingerprint")
    told = {
        f"{prefix}{name}.{key}": shape
        for kind, prefix in (("parts", ""), ("masks", "masks."), ("gates", "gates."))
        for name, value in config.get(kind, {}).items()
        for key, shape in value.get("tensors", {}).items()
    }
    if not header.keys() == told.keys() == patches.tensors.keys():
        found.append("the files and the set name different tensors")
        return found
    covered = 0
    for name, tensor in patches.tensors.items():
        entry, array = header[name], tensor.numpy()
        first, last = entry["data_offsets"]
        covered += last - first
        if array.dtype != np.float32 or entry["dtype"] != "F32" or not np.isfinite(array).all():
            found.append(f"tensor {name}: {entry['dtype']}, or not finite")
        if not list(array.shape) == entry["shape"] == told[name]:
            found.append(f"tensor {name}: shape {array.shape}, header {entry['shape']}, config {told[name]}")
        if data[begin + first : begin + last] != array.astype("<f4").tobytes():
            found.append(f"tensor {name}: other bytes than in the file")
    if covered != len(data) - begin:
        found.append(f"{len(data) - begin} bytes of tensors, {covered} used")
    return found


def _part_faults(patches: xpatch.PatchSet) -> list[str]:
    found = []
    part: Any
    for name, part in patches.parts.items():
        sizes: dict[str, int] = {}
        for key, tensor in part.tensors.items():
            axes = _AXES[part.form][key]
            if len(axes) != tensor.ndim or any(
                sizes.setdefault(axis, n) != n for axis, n in zip(axes, tensor.shape, strict=False)
            ):
                found.append(f"part {name}: the axes of {key} do not agree")
        width_in = sizes.get("i", sizes.get("d"))
        width_out = sizes.get("o", sizes.get("d"))
        if part.mask is not None:
            mask = patches.masks.get(part.mask)
            wanted = [(len(mask.languages), width_in), (len(mask.languages), width_out)] if mask else []
            if mask is None or [tuple(mask.inner.shape), tuple(mask.outer.shape)] != wanted:
                found.append(f"part {name}: mask {part.mask!r} is missing or does not fit")
        if part.gate is not None:
            gate = patches.gates.get(part.gate)
            if gate is None or (gate.keys is not None and gate.keys.shape[1] != width_in):
                found.append(f"part {name}: gate {part.gate!r} is missing or does not fit")
    for name, gate in patches.gates.items():
        ball = gate.keys is not None and gate.radii is not None and len(gate.keys) == len(gate.radii)
        if (gate.kind == "ball") != ball or (gate.kind == "threshold") != (gate.threshold is not None):
            found.append(f"gate {name}: not what its kind needs")
    return found


def _ledger_faults(patches: xpatch.PatchSet) -> list[str]:
    found = []
    if len({edit.id for edit in patches.edits}) < len(patches.edits):
        found.append("an edit id occurs twice")
    owned = [(name, row) for edit in patches.edits for name, rows in edit.rows.items() for row in rows]
    if len(set(owned)) < len(owned):
        found.append("a row has two owners")
    for edit in patches.edits:
        for name, rows in edit.rows.items():
            count = patches.parts[name].count if name in patches.parts else -1
            if count < 0 or any(type(row) is not int or not 0 <= row < count for row in rows):
                found.append(f"edit {edit.id!r} owns rows that do not exist")
        if edit.request is not None and edit.request.id != edit.id:
            found.append(f"edit {edit.id!r} holds another edit's request")
    return found


def _name_faults(patches: xpatch.PatchSet) -> list[str]:
    names = [*patches.parts, *patches.masks, *patches.gates]
    found = [f"name {name!r}" for name in names if not _PLAIN.fullmatch(name)]
    name = patches.name
    if name is not None and (
        re.search(r"[/\\\x00-\x1f]|^[A-Za-z]:|^[. ]*$", name) or len(name.encode("utf-8", "replace")) > 255
    ):
        found.append(f"set name {name!r}")
    return found


def _limit_faults(patches: xpatch.PatchSet, files: Mapping[str, bytes], limits: xpatch.Limits) -> list[str]:
    keys = sum(0 if gate.radii is None else len(gate.radii) for gate in patches.gates.values())
    languages = [len(mask.languages) for mask in patches.masks.values()]
    languages += [len(edit.request.versions) for edit in patches.edits if edit.request is not None]
    counts = {
        "config_bytes": len(files[CONFIG]),
        "header_bytes": int.from_bytes(files[TENSORS][:8], "little"),
        "tensor_bytes": sum(tensor.numel() * 4 for tensor in patches.tensors.values()),
        "parts": max(len(patches.parts), len(patches.masks), len(patches.gates)),
        "tensors": len(patches.tensors),
        "edits": len(patches.edits),
        "languages": max(languages, default=0),
        "neurons": sum(part.count for part in patches.parts.values()) + keys,
    }
    return [f"limit {name}: {count}" for name, count in counts.items() if count > getattr(limits, name)]


def _part(part: Any) -> dict[str, Any]:
    words = {key: getattr(part, key, None) for key in ("site", "activation", "mask", "gate")}
    return _some({"form": part.form, **words, "tensors": _shapes(part)})


def _edit(edit: Any) -> dict[str, Any]:
    made = {key: getattr(edit, key) for key in ("id", "method", "status", "group", "seed", "message")}
    made["rows"] = {name: list(rows) for name, rows in edit.rows.items()} or None
    made["hyperparameters"] = _thawed(edit.hyperparameters) or None
    made["request"] = None if edit.request is None else _request(edit.request)
    return _some(made)


def _request(request: Any) -> dict[str, Any]:
    made = {key: getattr(request, key) for key in ("id", "target", "old_target", "author", "reason", "expires")}
    made["language"] = None if request.language == "en" else request.language
    made["versions"] = {code: _version(version) for code, version in request.versions.items()}
    return _some(made)


def _version(version: Any) -> dict[str, Any]:
    made = {key: getattr(version, key) for key in ("text", "text_pair", "target", "subject")}
    for key in ("rephrases", "locality", "portability"):
        made[key] = [_some(vars(probe)) for probe in getattr(version, key)] or None
    return _some(made)


def _shapes(value: Any) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in value.tensors.items()}


def _some(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_thawed(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} in the ledger")
    return value
