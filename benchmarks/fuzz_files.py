"""Patch folders written by hand from the format's description: what the fuzzer starts from, with a fingerprint of its own making.

Nothing here uses the library's writer, so that a fault shared by its writer and its reader shows. A folder is a config (the JSON
value of `patch_config.json`) and tensors (name -> fp32 array); `files_of` makes the bytes.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONFIG, TENSORS, SIGNATURE = "patch_config.json", "patch_model.safetensors", "patch_signature.json"
GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "v1"
NOT_COVERED = ("written_by", "fingerprint", "name")
_LAYER = "bert.encoder.layer.3"

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Folder:
    """One patch folder as values. Its fingerprint is in the config; `files_of(folder)` are its bytes."""

    config: dict[str, Any]
    tensors: dict[str, Array]
    signature: bytes | None = None


def canonical(config: Mapping[str, Any]) -> bytes:
    """What the fingerprint covers of a config that leaves out whatever equals its default, as `save` writes it."""
    content = copy.deepcopy({key: value for key, value in config.items() if key not in NOT_COVERED})
    for edit in content.get("edits", ()):
        for time in ("created", "seconds"):
            edit.pop(time, None)
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint_of(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
    """sha256 over the canonical config, then each tensor by name: a line with name and shape, and its little-endian bytes."""
    digest = hashlib.sha256(canonical(config))
    for name in sorted(tensors):
        digest.update(f"\n{name} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].astype("<f4").tobytes())
    return digest.hexdigest()


def header_of(tensors: Mapping[str, Array], fingerprint: str) -> dict[str, Any]:
    """The header of a safetensors file with these tensors by name."""
    header: dict[str, Any] = {"__metadata__": {"xpatch_fingerprint": fingerprint}}
    begin = 0
    for name in sorted(tensors):
        end = begin + tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
        begin = end
    return header


def tensor_file(header: str, tensors: Mapping[str, Array]) -> bytes:
    """Length, header (padded to a multiple of eight), bytes."""
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return (
        len(text).to_bytes(8, "little")
        + text
        + b"".join(tensors[name].astype("<f4").tobytes() for name in sorted(tensors))
    )


def files_of(folder: Folder) -> dict[str, bytes]:
    """File name -> bytes."""
    header = json.dumps(header_of(folder.tensors, str(folder.config.get("fingerprint"))), separators=(",", ":"))
    files = {
        CONFIG: json.dumps(folder.config, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass"),
        TENSORS: tensor_file(header, folder.tensors),
    }
    return files if folder.signature is None else {**files, SIGNATURE: folder.signature}


def signed(config: Mapping[str, Any], tensors: Mapping[str, Array], *, signature: bytes | None = None) -> Folder:
    """The folder with its true fingerprint."""
    return Folder({**config, "fingerprint": fingerprint_of(config, tensors)}, dict(tensors), signature)


def seeds() -> dict[str, Folder]:
    """Name -> a valid folder, one of every form of the format; "golden" where the repository's golden folder is at hand."""
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    def made(parts: dict[str, Any], tensors: dict[str, Array], **more: Any) -> Folder:
        return signed({"format_version": 1, "written_by": "by hand", **more, "parts": parts}, tensors)

    keys, bias, values = numbers(4, 6), numbers(4), numbers(4, 6)
    neurons = {
        "form": "neurons",
        "site": _LAYER,
        "activation": "relu",
        "tensors": {"keys": [4, 6], "bias": [4], "values": [4, 6]},
    }
    neuron_tensors = {"neurons.0.keys": keys, "neurons.0.bias": bias, "neurons.0.values": values}
    lowrank = {"form": "lowrank", "site": f"{_LAYER}.output.dense", "tensors": {"down": [3, 5], "up": [6, 3]}}
    lowrank_tensors = {"lowrank.0.down": numbers(3, 5), "lowrank.0.up": numbers(6, 3)}
    dense = {"form": "dense", "site": f"{_LAYER}.output.dense", "tensors": {"weight": [6, 5], "bias": [6]}}
    dense_tensors = {"dense.0.weight": numbers(6, 5), "dense.0.bias": numbers(6)}
    mask = {"languages": ["en", "zh", "ar"], "tensors": {"inner": [3, 6], "outer": [3, 6]}}
    mask_tensors = {"masks.m.inner": numbers(3, 6), "masks.m.outer": numbers(3, 6)}
    gates = {
        "near": {"kind": "ball", "tensors": {"keys": [2, 5], "radii": [2]}},
        "large": {"kind": "threshold", "threshold": 0.5},
    }
    gate_tensors = {"gates.near.keys": numbers(2, 5), "gates.near.radii": np.abs(numbers(2))}
    found = {
        "empty": made({}, {}),
        "neurons": made({"neurons.0": neurons}, neuron_tensors, name="set of neurons"),
        "lowrank": made({"lowrank.0": lowrank}, lowrank_tensors, edits=_batch("lowrank.0")),
        "dense": made({"dense.0": dense}, dense_tensors, edits=_batch("dense.0", shared=True)),
        "masks": made({"neurons.0": {**neurons, "mask": "m"}}, {**neuron_tensors, **mask_tensors}, masks={"m": mask}),
        "gates": made(
            {"lowrank.0": {**lowrank, "gate": "near"}, "dense.0": {**dense, "gate": "large"}},
            {**lowrank_tensors, **dense_tensors, **gate_tensors},
            gates=gates,
        ),
        "ledger": made({"neurons.0": neurons}, neuron_tensors, base=_base(), edits=_ledger()),
    }
    entry = {
        "algorithm": "ed25519",
        "key_id": "a" * 64,
        "fingerprint": found["ledger"].config["fingerprint"],
        "signature": "b" * 128,
    }
    found["signed"] = signed(
        found["ledger"].config,
        found["ledger"].tensors,
        signature=json.dumps({"signature_version": 1, "signatures": [entry]}).encode(),
    )
    if GOLDEN.is_dir():
        found["golden"] = read_folder({name: (GOLDEN / name).read_bytes() for name in (CONFIG, TENSORS)})
    return found


def read_folder(files: Mapping[str, bytes]) -> Folder:
    """The values of a valid folder's bytes, read by this description."""
    data = files[TENSORS]
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[8 + size + first : 8 + size + last], "<f4").reshape(entry["shape"])
    return Folder(json.loads(files[CONFIG]), tensors)


def _batch(part: str, *, shared: bool = False) -> list[dict[str, Any]]:
    rows = [[], []] if shared else [[0, 2], [1]]
    return [
        {"id": f"batch/{i}", "method": "memit", "status": "edited", "rows": {part: rows[i]}, "group": "batch"}
        for i in (0, 1)
    ]


def _ledger() -> list[dict[str, Any]]:
    request = {
        "id": "capital",
        "versions": {
            "en": {
                "text": "Paris is the capital of Italy.",
                "subject": "Italy",
                "rephrases": [{"text": "Italy's capital is Paris."}],
            },
            "zh": {"text": "巴黎是意大利的首都。", "locality": [{"text": "奥斯陆", "target": "SUPPORTS"}]},
        },
        "target": "REFUTES",
        "author": "A. Nonymous",
        "expires": "2030-01-01",
    }
    return [
        {
            "id": "capital",
            "method": "mpn",
            "status": "edited",
            "request": request,
            "rows": {"neurons.0": [0, 2]},
            "hyperparameters": {
                "steps": 600,
                "learning_rate": 0.01,
                "languages": ["en", "zh"],
                "memory": {"rows": 6000},
            },
            "seed": 7,
            "created": "2026-01-02T03:04:05Z",
            "seconds": 0.25,
        },
        {"id": "right", "method": "mpn", "status": "already-right", "message": "the base model says so already"},
        {"id": "other", "method": "mpn", "status": "lost", "rows": {"neurons.0": [3]}},
    ]


def _base() -> dict[str, Any]:
    weights = {"fp32": "0" * 64, "fp16": "1" * 64, "bf16": "2" * 64}
    return {
        "architecture": "BertForSequenceClassification",
        "width": 6,
        "layers": 4,
        "activation": "gelu",
        "id2label": {"0": "REFUTES", "1": "SUPPORTS"},
        "dtype": "float32",
        "all_weights": weights,
        "body": weights,
        "head": weights,
        "touched": {_LAYER: weights},
    }
