"""`patch_config.json`, format version 1: its schema, a set's config, and the fingerprint over it.

`python -m xpatch.patches.config` rewrites the committed JSON schemas of patch folders and of edit requests.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xpatch._version import __version__
from xpatch.errors import FormatError
from xpatch.patches.checks import thawed
from xpatch.patches.forms import Part, Value
from xpatch.patches.identity import BaseIdentity
from xpatch.patches.jsonl import shorten
from xpatch.patches.limits import DEFAULT, Limits
from xpatch.patches.names import check_set_name
from xpatch.patches.requests import EditRequest, request_schema
from xpatch.patches.signatures import SIGNATURE_SCHEMA_FILE, signature_schema
from xpatch.patches.strict_json import read_json
from xpatch.patches.types import EditStatus, PatchSet

FORMAT_VERSION = 1
CONFIG_SCHEMA_FILE = "patch_config.schema.json"
REQUEST_SCHEMA_FILE = "request.schema.json"

# A list of numbers over several lines; inside a JSON string no line ends, so texts are never touched.
_NUMBER_LIST = re.compile(r"\[\n\s*((?:-?[\d.eE+-]+,\n\s*)*-?[\d.eE+-]+)\n\s*\]")

_LABEL = re.compile("-?[0-9]{1,9}")
_ERRORS_LISTED = 100

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "identity"]
Name = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=0)]
Shapes = Annotated[dict[str, list[Size]], Field(description="tensor -> shape; stored in fp32 as '<name>.<tensor>'")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NeuronsConfig(_Strict):
    """`y += act(x Kᵀ + b) V` beside an FFN; tensors keys [N, D], bias [N], values [N, D]."""

    form: Literal["neurons"]
    site: Name
    activation: Activation
    mask: Name | None = None
    gate: Name | None = None
    tensors: Shapes


class LowRankConfig(_Strict):
    """`y += (x downᵀ) upᵀ` beside a linear layer; tensors down [R, D_in], up [D_out, R]."""

    form: Literal["lowrank"]
    site: Name
    mask: Name | None = None
    gate: Name | None = None
    tensors: Shapes


class DenseConfig(_Strict):
    """`y += x ΔWᵀ + Δb` beside a linear layer; tensors weight [D_out, D_in], optionally bias [D_out]."""

    form: Literal["dense"]
    site: Name
    mask: Name | None = None
    gate: Name | None = None
    tensors: Shapes


class MaskConfig(_Strict):
    """A language mask; tensors inner [L, D_in], outer [L, D_out], one row per language."""

    languages: list[Name] = Field(min_length=1)
    tensors: Shapes


class GateConfig(_Strict):
    """A gate; kind "ball" has tensors keys [K, D], radii [K]; kind "threshold" has a threshold."""

    kind: Literal["ball", "threshold"]
    threshold: float | None = None
    tensors: Shapes = {}


class EditConfig(_Strict):
    """One line of the ledger; rows: part -> the neurons or ranks this edit owns, [] for a part it shares as a whole."""

    id: Name
    method: Name
    status: EditStatus
    request: EditRequest | None = None
    rows: dict[str, list[Size]] = {}
    group: Name | None = None
    hyperparameters: dict[str, Any] = {}
    seed: int | None = None
    created: str | None = None
    seconds: float | None = None
    message: str | None = None


class PatchConfig(_Strict):
    """`patch_config.json`: everything about a patch set but its tensors, which lie in `patch_model.safetensors`."""

    format_version: Literal[1]
    written_by: str
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    name: Name | None = Field(default=None, description="given only where it differs from the folder's name")
    base: BaseIdentity | None = None
    parts: dict[str, Annotated[NeuronsConfig | LowRankConfig | DenseConfig, Field(discriminator="form")]]
    masks: dict[str, MaskConfig] = {}
    gates: dict[str, GateConfig] = {}
    edits: list[EditConfig] = []


def config_json(patches: PatchSet, *, name: str | None) -> str:
    """The text of a set's `patch_config.json`; `name` is what it says there."""
    content = {
        "format_version": FORMAT_VERSION,
        "written_by": f"xpatch {__version__}",
        "fingerprint": patches.fingerprint,
        "name": name,
        **_content(patches),
    }
    config = PatchConfig.model_validate({key: value for key, value in content.items() if value is not None})
    data = config.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False)
    return _NUMBER_LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def parse_config(text: str | bytes, *, where: str, limits: Limits = DEFAULT) -> PatchConfig:
    """Read the text of a `patch_config.json`, trusting none of it.

    Raises `FormatError` naming the field, or the limit; a newer format says to upgrade.
    """
    try:
        encoded = text.encode() if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError:
        raise FormatError(
            f"{where}: expected UTF-8 text, found half a surrogate pair; read the file as bytes"
        ) from None
    limits.check("config_bytes", len(encoded), where)
    data = read_json(encoded, where=where, limits=limits)
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, bool) or not isinstance(version, int):
        raise FormatError(
            f"{where}: expected a patch config with a 'format_version', found {shorten(repr(version))}; is this a patch folder?"
        )
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where}: expected format version {FORMAT_VERSION} or older, found {version}, written by a newer xpatch; "
            "upgrade: pip install --upgrade xpatch"
        )
    _check_counts(data, where, limits)
    try:
        config = PatchConfig.model_validate(data)
    except ValidationError as error:
        raise _invalid(error, where) from None
    _check_ledger(config, where, limits)
    if config.name is not None:
        check_set_name(config.name, f"{where}: name")
    return config


def _check_counts(data: dict[str, Any], where: str, limits: Limits) -> None:
    """What must be known before pydantic sees the data: it lists every single error, and turns label ids into numbers."""
    for key, limit in (("parts", "parts"), ("masks", "parts"), ("gates", "parts"), ("edits", "edits")):
        if isinstance(data.get(key), (dict, list)):
            limits.check(limit, len(data[key]), f"{where}: {key}")
    base = data.get("base")
    labels = base.get("id2label") if isinstance(base, dict) else None
    for index in labels if isinstance(labels, dict) else ():
        if not _LABEL.fullmatch(index):  # large numbers may be chosen to share one hash value
            raise FormatError(
                f"{where}: base.id2label: expected indices such as '0', found {shorten(repr(index))}; restore the file"
            )


def _check_ledger(config: PatchConfig, where: str, limits: Limits) -> None:
    for name, mask in config.masks.items():
        limits.check("languages", len(mask.languages), f"{where}: masks.{name}")
    for edit in config.edits:
        told = f"{where}: edit {shorten(edit.id)!r}"
        limits.check("languages", len(edit.request.versions) if edit.request else 0, told)
        for rows in edit.rows.values():
            limits.check("neurons", len(rows), told)
            limits.check("neurons", max(rows, default=-1) + 1, f"{told}, rows")


def _invalid(error: ValidationError, where: str) -> FormatError:
    count = error.error_count()
    if count > _ERRORS_LISTED:  # the list would be far larger than the file
        return FormatError(f"{where}: {count} values do not fit the format; restore the file or save the set again")
    first = error.errors(include_url=False)[0]
    field = shorten(".".join(str(part) for part in first["loc"]))
    found = "" if first["type"] == "missing" else f"; found {str(_start(first['input']))[:120]!r}"
    return FormatError(f"{where}: {field}: {shorten(first['msg'])}{found}; restore the file or save the set again")


def _start(value: Any) -> Any:
    """Enough of a value to be recognised in a message."""
    if isinstance(value, (list, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return value


def fingerprint(patches: PatchSet) -> str:
    """sha256 (hex) over the canonical config and every tensor's name, shape and little-endian fp32 bytes.

    The set's name, the edits' times and the order of parts do not count; the ledger and the base do.
    """
    config = PatchConfig.model_validate(
        {"format_version": 1, "written_by": "", "fingerprint": "0" * 64, **_content(patches)}
    )
    content = config.model_dump(
        mode="json", exclude_defaults=True, exclude={"written_by": True, "fingerprint": True, "name": True}
    )
    for edit in content.get("edits", ()):
        for time in ("created", "seconds"):
            edit.pop(time, None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    for name, tensor in sorted(patches.tensors.items()):
        digest.update(f"\n{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).reshape(-1).view("u1").data)
    return digest.hexdigest()


def config_schema() -> dict[str, Any]:
    """The JSON schema of `patch_config.json` (committed as `patch_config.schema.json`)."""
    return {"$id": f"xpatch-patch-config-v{FORMAT_VERSION}", **PatchConfig.model_json_schema()}


def schema_files() -> dict[str, str]:
    """File name -> text of the committed JSON schemas."""
    schemas = {
        CONFIG_SCHEMA_FILE: config_schema(),
        REQUEST_SCHEMA_FILE: request_schema(),
        SIGNATURE_SCHEMA_FILE: signature_schema(),
    }
    return {name: json.dumps(schema, ensure_ascii=False, indent=1) + "\n" for name, schema in schemas.items()}


def _content(patches: PatchSet) -> dict[str, Any]:
    return {
        "base": patches.base,
        "parts": {name: _part(part) for name, part in patches.parts.items()},
        "masks": {
            name: {"languages": list(mask.languages), "tensors": _shapes(mask)} for name, mask in patches.masks.items()
        },
        "gates": {
            name: {"kind": gate.kind, "threshold": gate.threshold, "tensors": _shapes(gate)}
            for name, gate in patches.gates.items()
        },
        "edits": [{key: thawed(getattr(record, key)) for key in EditConfig.model_fields} for record in patches.edits],
    }


def _part(part: Part) -> dict[str, Any]:
    plain = {key: getattr(part, key) for key in ("site", "activation", "mask", "gate") if hasattr(part, key)}
    return {"form": part.form, **plain, "tensors": _shapes(part)}


def _shapes(value: Value) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in value.tensors.items()}


def main(folder: Path | None = None) -> None:
    """Rewrite the committed JSON schemas."""
    for name, text in schema_files().items():
        path = (folder or Path(__file__).parent) / name
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
