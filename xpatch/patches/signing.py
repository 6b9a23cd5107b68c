"""Sign a patch set and check who signed it: ed25519 (RFC 8032) over its fingerprint, through the package cryptography.

    xpatch.sign("fixes/", "release.key")                           # adds patch_signature.json to the folder
    patches = xpatch.load("fixes/", trusted_keys=["release.key.pub"])  # refuses what no trusted key has signed

A signature says that the holder of a key vouches for this content: see `xpatch.patches.signatures` for what that covers. It says
nothing of the name under which the set is applied, and nothing of time: a set signed once stays signed, so take a key out of
`trusted_keys`, or give edits an `expires`, to end it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from xpatch.errors import FormatError
from xpatch.patches import folders, keys
from xpatch.patches.keys import Key, generate_key
from xpatch.patches.limits import Limits
from xpatch.patches.signatures import SIGNATURE_FILE, Signature, signature_json
from xpatch.patches.types import PatchSet

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = ["Key", "generate_key", "sign", "verify"]

_LISTED = 3
_DOMAIN = b"xpatch patch set v1\0"


def sign(target: PatchSet | str | Path, private_key: Key, *, limits: Limits | None = None) -> PatchSet:
    """The set with one signature more; a folder (or URL) gets it as a file too. A key that has signed already signs anew.

    target: a set, or the folder of one, which is read (within `limits`) and whose `patch_signature.json` is replaced as a whole.
    private_key: a file, PEM text, 64 hex digits or 32 bytes.
    Raises `FormatError` for a folder that does not load or cannot be written, or what is no private key; `BackendError` without
    cryptography.
    """
    key = keys.private_key(private_key)
    if isinstance(target, PatchSet):
        patches = target
    else:
        from xpatch.patches.store import load

        patches = load(target, limits=limits)
    made = Signature(
        key_id=keys.key_id(key.public_key()),
        fingerprint=patches.fingerprint,
        signature=key.sign(_message(patches.fingerprint)).hex(),
    )
    others = [each for each in patches.signatures if each.key_id != made.key_id]
    signed = replace(patches, signatures=(*others, made))
    if not isinstance(target, PatchSet):
        folders.write_file(target, SIGNATURE_FILE, signature_json(signed.signatures).encode())
    return signed


def verify(patches: PatchSet, trusted_keys: Iterable[Key] | Key) -> str:
    """The id of the first trusted key that signed this very set.

    trusted_keys: public keys, each a file, PEM text, 64 hex digits or 32 bytes; one alone may be given as it is.
    Raises `FormatError` for a set that carries no signature, none by a trusted key, or one that is not genuine; `BackendError`
    without cryptography.
    """
    given = [trusted_keys] if isinstance(trusted_keys, (str, Path, bytes)) else list(trusted_keys)
    trusted = {keys.key_id(key): key for key in map(keys.public_key, given)}
    told = f"patch set {patches.name!r} ({patches.fingerprint[:12]})"
    if not patches.signatures:
        raise FormatError(
            f"{told}: expected a signature, found none for this content; sign it with xpatch.sign, "
            "and again after any change, for select, drop, + and redact make another set"
        )
    known = [each for each in patches.signatures if each.key_id in trusted]
    if not known:
        signers = ", ".join(each.key_id[:12] for each in patches.signatures[:_LISTED])
        raise FormatError(
            f"{told}: expected a signature by one of {len(trusted)} trusted keys, found only {signers}; "
            "do not apply it, or trust the signer's key"
        )
    for each in known:
        if _is_genuine(each, patches.fingerprint, trusted[each.key_id]):
            return each.key_id
    raise FormatError(
        f"{told}: expected a genuine signature by {known[0].key_id[:12]}, found one that does not match this content; "
        "the set or its signature was altered, do not apply it"
    )


def _is_genuine(signature: Signature, fingerprint: str, key: Ed25519PublicKey) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(bytes.fromhex(signature.signature), _message(fingerprint))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(fingerprint: str) -> bytes:
    return _DOMAIN + bytes.fromhex(fingerprint)
