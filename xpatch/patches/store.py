"""A patch set as a folder: `patch_config.json`, `patch_model.safetensors`, a `README.md` card, and `patch_signature.json` if signed.

`save` and `load` are exact: the tensors' bytes, the ledger and the fingerprint come back as they were. No pickle. What `load` reads
is trusted in nothing: every size is known before memory is taken for it, and whatever is wrong is a `FormatError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xpatch.errors import FormatError
from xpatch.patches import folders
from xpatch.patches.card import card
from xpatch.patches.checks import thawed
from xpatch.patches.config import PatchConfig, config_json, parse_config
from xpatch.patches.expected import expected_tensors, form_of, total_bytes
from xpatch.patches.forms import Gate, LanguageMask
from xpatch.patches.jsonl import shorten
from xpatch.patches.limits import DEFAULT, Limits
from xpatch.patches.names import check_set_name
from xpatch.patches.signatures import SIGNATURE_FILE, Signature, parse_signatures, signature_json
from xpatch.patches.tensorfile import FINGERPRINT_KEY, most_bytes, read_tensors, write_tensors
from xpatch.patches.types import EditRecord, PatchSet

if TYPE_CHECKING:
    from xpatch.patches.signing import Key

__all__ = ["CARD_FILE", "CONFIG_FILE", "FINGERPRINT_KEY", "SIGNATURE_FILE", "TENSOR_FILE", "load", "save"]

CONFIG_FILE = "patch_config.json"
TENSOR_FILE = "patch_model.safetensors"
CARD_FILE = "README.md"
_SHOWN = 2000  # characters of an error about a file; a hostile name could fill a log


def save(patches: PatchSet, folder: str | Path) -> Path | str:
    """Write `patches` as a patch folder: a local path (returned as a Path) or any fsspec URL (returned as it is).

    The folder appears whole or not at all: it is written beside its place and renamed; an existing patch folder is replaced,
    other files in it stay. (On an object store the files are replaced one by one; a half-replaced set fails to load.)
    Raises `FormatError` where the folder is not a patch folder or cannot be written, or the set's name could not be a file's;
    `BackendError` without fsspec.
    """
    if patches.name is not None:
        check_set_name(patches.name, "patch set, name")
    name = folders.name_of(folder)
    files = {
        TENSOR_FILE: write_tensors(patches.tensors, patches.fingerprint),
        CARD_FILE: card(patches, patches.name or name).encode(),
        CONFIG_FILE: config_json(patches, name=None if patches.name == name else patches.name).encode(),
    }
    if patches.signatures:
        files[SIGNATURE_FILE] = signature_json(patches.signatures).encode()
    if folders.is_url(folder):
        folders.write_url(str(folder), files, mark=CONFIG_FILE)
    else:
        folders.write_local(Path(folder), files, mark=CONFIG_FILE)
    if not patches.signatures:  # those of the set that was there are not for this one
        folders.discard(folder, SIGNATURE_FILE)
    return str(folder) if folders.is_url(folder) else Path(folder)


def load(
    folder: str | Path | Mapping[str, bytes],
    *,
    limits: Limits | None = None,
    trusted_keys: Iterable[Key] | Key | None = None,
) -> PatchSet:
    """Read a patch folder: a local path, hf://user/repo[/folder], any fsspec URL, or its files as {file name: bytes}.

    A set without a name of its own gets the folder's. limits: what is too large to be read; `Limits()` by default.
    trusted_keys: public keys, one of which must have signed the set (see `xpatch.verify`).

    Raises `FormatError` naming the file and tensor for anything missing, damaged, hostile, changed after saving, written by a newer
    xpatch, above a limit, or not signed by a trusted key; `BackendError` where a URL or a signature needs a package that is missing.
    """
    try:
        patches = _read(folder, DEFAULT if limits is None else limits)
    except FormatError as error:
        if len(str(error)) <= _SHOWN:
            raise
        raise FormatError(shorten(str(error), _SHOWN)) from None
    if trusted_keys is not None:
        from xpatch.patches.signing import verify

        verify(patches, trusted_keys)
    return patches


def _read(folder: str | Path | Mapping[str, bytes], limits: Limits) -> PatchSet:
    read = folders.reader(folder)
    place = "" if isinstance(folder, Mapping) else f"{str(folder).rstrip('/')}/"
    config_at, tensors_at, signed_at = (f"{place}{file}" for file in (CONFIG_FILE, TENSOR_FILE, SIGNATURE_FILE))
    text = read(CONFIG_FILE, limits.config_bytes, limits.refusal("config_bytes")) or b""
    config = parse_config(text, where=config_at, limits=limits)
    expected = expected_tensors(config, where=config_at, limits=limits)
    most = most_bytes(total_bytes(expected), limits)
    told = f"{limits.refusal('header_bytes')}, unless the two files belong to different sets"
    data = read(TENSOR_FILE, most, told) or b""
    tensors = read_tensors(data, expected, config.fingerprint, where=tensors_at, limits=limits)
    del data
    signed = read(SIGNATURE_FILE, limits.signature_bytes, limits.refusal("signature_bytes"), optional=True)
    signatures = () if signed is None else parse_signatures(signed, where=signed_at, limits=limits)
    own_name = None if isinstance(folder, Mapping) else folders.name_of(folder)
    try:
        patches = _assemble(config, tensors, config.name or own_name, signatures)
    except FormatError as error:
        raise FormatError(f"{config_at} and {TENSOR_FILE} beside it: {error}") from None
    if patches.fingerprint != config.fingerprint:
        raise FormatError(
            f"{config_at}: expected fingerprint {config.fingerprint[:12]}, found {patches.fingerprint[:12]}; "
            "the config or the tensors were changed after saving; restore the folder, or change the set with xpatch and save it"
        )
    return patches


def _assemble(
    config: PatchConfig, tensors: dict[str, torch.Tensor], name: str | None, signatures: tuple[Signature, ...]
) -> PatchSet:
    def own(owner: str, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        return {key: tensors[f"{owner}.{key}"] for key in keys}

    parts = {
        key: form_of(part.form)(**part.model_dump(exclude={"form", "tensors"}), **own(key, part.tensors))
        for key, part in config.parts.items()
    }
    masks = {
        key: LanguageMask(languages=tuple(mask.languages), **own(f"masks.{key}", mask.tensors))
        for key, mask in config.masks.items()
    }
    gates = {
        key: Gate(kind=gate.kind, threshold=gate.threshold, **own(f"gates.{key}", gate.tensors))
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
    return PatchSet(
        parts=parts, edits=edits, masks=masks, gates=gates, base=config.base, name=name, signatures=signatures
    )
