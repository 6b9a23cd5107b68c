"""Sets that are wrong in what they mean: both files changed alike, and the fingerprint computed anew, as an attacker would."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .fuzz_files import Array, Folder, files_of, fingerprint_of

_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**99, -(10**18), 0.5, -0.0, 1e308, 1.0, "", " ", "x", "en", "relu", "..",
    "../../etc/passwd", "/etc/passwd", "C:\\x", "a/b", "a\x00b", "\x1b[2J", "\u202e", "masks.m", "gates.near", "neurons.0", "__metadata__", "__base__",
    "x" * 300, "中" * 100, "1e999", "NaN", "\ud800", [], {}, [[]], [0], [0, 0], [1, 2, 3], ["x"], [True], [1.5], {"x": 1}, {"0": "A", "00": "B"},
    [[[[[[[[[[]]]]]]]]]], list(range(50)), {"a": {"b": {"c": {}}}}, "2030-01-01", "neurons", "dense", "lowrank", "edited", "ball", "threshold",
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip


def strange(rng: random.Random) -> Any:
    """A value nobody expects, made anew: a case must not change the next."""
    return copy.deepcopy(rng.choice(_STRANGE))


def with_fingerprint(config: Any, tensors: Mapping[str, Array]) -> Any:
    """The config with the fingerprint of what it now says, where that can be computed."""
    try:
        return {**config, "fingerprint": fingerprint_of(config, tensors)}
    except (ValueError, TypeError, AttributeError, UnicodeEncodeError):
        return config


def consistent(folder: Folder, folders: Mapping[str, Folder], rng: random.Random) -> dict[str, bytes]:
    """A folder that only its meaning can give away, if it is wrong at all; the signature `fuzz_mutations` calls."""
    config, tensors = (
        json.loads(json.dumps(folder.config)),
        {name: value.copy() for name, value in folder.tensors.items()},
    )
    change: Callable[..., None] = rng.choice(
        (_rename, _resize, _rows, _repeat_edit, _references, _shapes_only, _drop_part, _set_name)
    )
    change(config, tensors, rng)
    return files_of(Folder(with_fingerprint(config, tensors), tensors, folder.signature))


def _rename(config: dict[str, Any], tensors: dict[str, Array], rng: random.Random) -> None:
    kind = rng.choice(("parts", "masks", "gates"))
    if not config.get(kind):
        return
    old, new = rng.choice(list(config[kind])), str(strange(rng))
    config[kind] = {new if name == old else name: value for name, value in config[kind].items()}
    prefix = "" if kind == "parts" else f"{kind}."
    for name in [name for name in tensors if name.startswith(f"{prefix}{old}.")]:
        tensors[f"{prefix}{new}.{name.rpartition('.')[2]}"] = tensors.pop(name)
    for edit in config.get("edits", ()):
        if kind == "parts" and old in edit.get("rows", {}):
            edit["rows"][new] = edit["rows"].pop(old)


def _resize(config: dict[str, Any], tensors: dict[str, Array], rng: random.Random) -> None:
    """One more or fewer row or column of one tensor, in both files."""
    if not tensors:
        return
    name = rng.choice(list(tensors))
    value, axis = tensors[name], rng.randrange(tensors[name].ndim)
    tensors[name] = np.concatenate((value, value), axis) if rng.random() < 0.5 else np.delete(value, slice(0, 1), axis)
    _told_shapes(config)[name][:] = tensors[name].shape


def _shapes_only(config: dict[str, Any], tensors: dict[str, Array], rng: random.Random) -> None:
    """Tensors without numbers but of enormous shape."""
    if not tensors:
        return
    name = rng.choice(list(tensors))
    huge = rng.choice((10**6, 10**7, 2**31, 2**40, 10**15))
    shape = rng.choice(((huge, 0), (0, huge), (huge,) if tensors[name].ndim == 1 else (huge, 0)))
    _told_shapes(config)[name][:] = shape
    if 0 in shape:
        tensors[name] = np.zeros(tuple(min(size, 2**31) for size in shape), np.float32)


def _rows(config: dict[str, Any], tensors: dict[str, Array], rng: random.Random) -> None:
    edits = config.get("edits")
    if not edits:
        config["edits"] = edits = [{"id": "made", "method": "mpn", "status": "edited"}]
    parts = list(config["parts"]) or ["none"]
    rows = rng.choice(([99], [3], [5, 7], [0], [0, 1, 2], [2, 3], [0, 0], [-1], [2**40], [True], ["0"], [0.0], []))
    rng.choice(edits).setdefault("rows", {})[rng.choice(parts) if rng.random() < 0.85 else "none"] = rows


def _repeat_edit(config: dict[str, Any], tensors: dict[str, Array], rng: random.Random) -> None:
    edits = config.setdefault("edits", [])
    edit = json.loads(json.dumps(rng.choice(edits))) if edits else {"id": "made", "method": "mpn", "status": "edited"}
    if rng.random() < 0.5:
        edit.pop("rows", None)
    if rng.random() < 0.5:
        edit.pop("request", None)
        edit["id"] = str(strange(rng))
    edits.append(edit)


def _references(config: dict[str, Any], tensors: dict[str, Array], rng: random.Random) -> None:
    if config["parts"]:
        part = config["parts"][rng.choice(list(config["parts"]))]
        part[rng.choice(("mask", "gate", "site"))] = rng.choice(
            (*config.get("masks", ()), *config.get("gates", ()), "none", "", None, "..", 0)
        )


def _set_name(config: dict[str, Any], tensors: dict[str, Array], rng: random.Random) -> None:
    config["name"] = str(strange(rng))


def _drop_part(config: dict[str, Any], tensors: dict[str, Array], rng: random.Random) -> None:
    kind = rng.choice(("parts", "masks", "gates"))
    if config.get(kind):
        name = rng.choice(list(config[kind]))
        del config[kind][name]
        for tensor in [key for key in tensors if key.startswith(f"{name}." if kind == "parts" else f"{kind}.{name}.")]:
            del tensors[tensor]
        if not config[kind] and kind != "parts":
            del config[kind]


def _told_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Tensor name -> the shape list inside the config."""
    return {
        f"{prefix}{name}.{key}": shape
        for kind, prefix in (("parts", ""), ("masks", "masks."), ("gates", "gates."))
        for name, value in config.get(kind, {}).items()
        for key, shape in value.get("tensors", {}).items()
    }
