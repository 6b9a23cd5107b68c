"""`patch_signature.json`: who vouches for a set's fingerprint. Its schema and the value a set carries; no cryptography here.

What a signature covers is what the fingerprint covers: parts, masks, gates, every tensor's bytes, the whole ledger (but the
times `created` and `seconds`) and the base. Outside it are the set's name, those times, which xpatch wrote it, and the card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xpatch.errors import FormatError
from xpatch.patches.jsonl import shorten
from xpatch.patches.limits import Limits
from xpatch.patches.strict_json import read_json

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet

SIGNATURE_FILE = "patch_signature.json"
SIGNATURE_SCHEMA_FILE = "patch_signature.schema.json"
SIGNATURE_VERSION = 1
ALGORITHM = "ed25519"
SIGNATURES_AT_MOST = 100

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Signature:
    """One signature over one fingerprint.

    key_id: sha256 (hex) of the raw 32-byte public key; fingerprint: of the set it was made for; signature: 64 bytes as hex.
    """

    key_id: str
    fingerprint: str
    signature: str


def carried(signatures: Iterable[Any], patches: PatchSet) -> tuple[Signature, ...]:
    """Those made for this very content, one a key (the last); a set drops all others. Raises `FormatError` for another value."""
    kept: dict[str, Signature] = {}
    for each in signatures:
        if not isinstance(each, Signature):
            raise FormatError(
                f"patch set, signatures: expected Signature values, found {type(each).__name__}; sign a set with xpatch.sign"
            )
        if each.fingerprint == patches.fingerprint:
            kept[each.key_id] = each
    return tuple(kept.values())


class _SignatureConfig(BaseModel):
    """ed25519 over `xpatch patch set v1`, a zero byte and the 32 bytes of the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    algorithm: Literal["ed25519"]
    key_id: Digest = Field(description="sha256 of the raw 32-byte public key")
    fingerprint: Digest
    signature: str = Field(pattern="^[0-9a-f]{128}$")


class SignatureConfig(BaseModel):
    """`patch_signature.json`: signatures of a patch set, each by another key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    signature_version: Literal[1]
    signatures: list[_SignatureConfig] = Field(max_length=SIGNATURES_AT_MOST)


def signature_json(signatures: Iterable[Signature]) -> str:
    """The text of a `patch_signature.json`."""
    listed = [
        {"algorithm": ALGORITHM, "key_id": each.key_id, "fingerprint": each.fingerprint, "signature": each.signature}
        for each in signatures
    ]
    return json.dumps({"signature_version": SIGNATURE_VERSION, "signatures": listed}, indent=1) + "\n"


def parse_signatures(data: bytes, *, where: str, limits: Limits) -> tuple[Signature, ...]:
    """Read a `patch_signature.json`; whether a signature is genuine is not asked here. Raises `FormatError`."""
    limits.check("signature_bytes", len(data), where)
    content = read_json(data, where=where, limits=limits)
    version = content.get("signature_version") if isinstance(content, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > SIGNATURE_VERSION:
        raise FormatError(
            f"{where}: expected signature version {SIGNATURE_VERSION}, found {version}, written by a newer xpatch; "
            "upgrade: pip install --upgrade xpatch"
        )
    try:
        config = SignatureConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = shorten(".".join(str(part) for part in first["loc"]))
        raise FormatError(f"{where}: {field}: {first['msg']}; sign the set again, or remove the file") from None
    seen: set[str] = set()
    for each in config.signatures:
        if each.key_id in seen:
            raise FormatError(
                f"{where}: key {each.key_id[:12]} signs twice; expected each key once; sign the set again"
            )
        seen.add(each.key_id)
    return tuple(Signature(each.key_id, each.fingerprint, each.signature) for each in config.signatures)


def signature_schema() -> dict[str, Any]:
    """The JSON schema of `patch_signature.json` (committed as `patch_signature.schema.json`)."""
    return {"$id": f"xpatch-patch-signature-v{SIGNATURE_VERSION}", **SignatureConfig.model_json_schema()}
