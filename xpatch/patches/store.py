"""A patch set as a folder: `patch_config.json`, `patch_model.safetensors` and a `README.md` card.

`save` and `load` are exact: the tensors' bytes, the ledger and the fingerprint come back as they were. No pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from xpatch.errors import FormatError
from xpatch.patches import folders
from xpatch.patches.card import card
from xpatch.patches.checks import thawed
from xpatch.patches.config import PatchConfig, config_json, parse_config
from xpatch.patches.forms import DenseDelta, Gate, LanguageMask, LowRankDelta, PatchNeurons
from xpatch.patches.types import EditRecord, PatchSet

CONFIG_FILE = "patch_config.json"
TENSOR_FILE = "patch_model.safetensors"
CARD_FILE = "README.md"
FINGERPRINT_KEY = "xpatch_fingerprint"
_FORMS: dict[str, Any] = {form.form: form for form in (PatchNeurons, LowRankDelta, DenseDelta)}


def save(patches: PatchSet, folder: str | Path) -> Path | str:
    """Write `patches` as a patch folder: a local path (returned as a Path) or any fsspec URL (returned as it is).

    The folder appears whole or not at all: it is written beside its place and renamed; an existing patch folder is replaced,
    other files in it stay. (On an object store the files are replaced one by one; a half-replaced set fails to load.)
    Raises `FormatError` where the folder is not a patch folder or cannot be written, `BackendError` without fsspec.
    """
    name = folders.name_of(folder)
    files = {
        TENSOR_FILE: safetensors.torch.save(patches.tensors, metadata={FINGERPRINT_KEY: patches.fingerprint}),
        CARD_FILE: card(patches, patches.name or name).encode(),
        CONFIG_FILE: config_json(patches, name=None if patches.name == name else patches.name).encode(),
    }
    if folders.is_url(folder):
        folders.write_url(str(folder), files, mark=CONFIG_FILE)
        return str(folder)
    folders.write_local(Path(folder), files, mark=CONFIG_FILE)
    return Path(folder)


def load(folder: str | Path) -> PatchSet:
    """Read a patch folder: a local path, hf://user/repo[/folder] or any fsspec URL.

    A set without a name of its own gets the folder's. Raises `FormatError` naming the file and tensor for anything missing,
    damaged, changed after saving or written by a newer xpatch; `BackendError` where a URL needs a package that is missing.
    """
    files = folders.read(folder, (CONFIG_FILE, TENSOR_FILE))
    config_at, tensors_at = (f"{str(folder).rstrip('/')}/{file}" for file in (CONFIG_FILE, TENSOR_FILE))
    config = parse_config(files[CONFIG_FILE], where=config_at)
    tensors = _read_tensors(files[TENSOR_FILE], config, tensors_at)
    try:
        patches = _assemble(config, tensors, name=config.name or folders.name_of(folder))
    except FormatError as error:
        raise FormatError(f"{config_at} and {TENSOR_FILE} beside it: {error}") from None
    if patches.fingerprint != config.fingerprint:
        raise FormatError(
            f"{config_at}: expected fingerprint {config.fingerprint[:12]}, found {patches.fingerprint[:12]}; "
            "the config or the tensors were changed after saving; restore the folder, or change the set with xpatch and save it"
        )
    return patches


def _read_tensors(data: bytes, config: PatchConfig, where: str) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise FormatError(
            f"{where}: expected a whole safetensors file, found {len(data)} bytes that do not parse ({error}); "
            "the file is truncated or corrupted, restore it or save the set again"
        ) from None
    if metadata.get(FINGERPRINT_KEY) != config.fingerprint:
        found = str(metadata.get(FINGERPRINT_KEY))[:12]
        raise FormatError(
            f"{where}: expected fingerprint {config.fingerprint[:12]} as in {CONFIG_FILE}, found {found}; "
            "the two files belong to different sets; copy the whole folder again"
        )
    expected = _expected_shapes(config)
    for name in sorted(expected.keys() ^ tensors.keys()):
        state = "is missing" if name in expected else "is not in the config"
        raise FormatError(
            f"{where}: tensor {name!r} {state}; the two files belong to different sets; copy the whole folder again"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.dtype != torch.float32 or list(tensor.shape) != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise FormatError(
                f"{where}: tensor {name!r}: expected torch.float32 {shape}, found {found}; restore the file or save again"
            )
    return tensors


def _expected_shapes(config: PatchConfig) -> dict[str, list[int]]:
    owners: dict[str, Any] = {
        **config.parts,
        **{f"masks.{name}": mask for name, mask in config.masks.items()},
        **{f"gates.{name}": gate for name, gate in config.gates.items()},
    }
    return {f"{owner}.{key}": list(shape) for owner, value in owners.items() for key, shape in value.tensors.items()}


def _assemble(config: PatchConfig, tensors: dict[str, torch.Tensor], name: str | None) -> PatchSet:
    def own(kind: Any, owner: str, value: Any, word: str) -> dict[str, torch.Tensor]:
        given = {key: tensors[f"{owner}.{key}"] for key in value.tensors}
        unknown, missing = set(given) - set(kind.tensor_fields), set(kind.tensor_fields) - set(given)
        if unknown or (missing and kind is not Gate and missing != {"bias"}) or (missing and kind is PatchNeurons):
            raise FormatError(
                f"{word}, tensors: expected {', '.join(kind.tensor_fields)}, found {', '.join(given) or 'none'}; restore it"
            )
        return given

    parts = {}
    for key, part in config.parts.items():
        kind = _FORMS[part.form]
        plain = part.model_dump(exclude={"form", "tensors"})
        parts[key] = kind(**plain, **own(kind, key, part, f"part {key!r}"))
    masks = {
        key: LanguageMask(languages=tuple(mask.languages), **own(LanguageMask, f"masks.{key}", mask, f"mask {key!r}"))
        for key, mask in config.masks.items()
    }
    gates = {
        key: Gate(kind=gate.kind, threshold=gate.threshold, **own(Gate, f"gates.{key}", gate, f"gate {key!r}"))
        for key, gate in config.gates.items()
    }
    edits = tuple(
        EditRecord(
            **{
                key: thawed(getattr(edit, key))
                for key in ("id", "method", "status", "group", "seed", "created", "seconds", "message")
            },
            request=edit.request,
            rows={part: tuple(rows) for part, rows in edit.rows.items()},
            hyperparameters=edit.hyperparameters,
        )
        for edit in config.edits
    )
    return PatchSet(parts=parts, edits=edits, masks=masks, gates=gates, base=config.base, name=name)
