"""ed25519 keys as files and texts: PEM, or the 32 raw bytes as 64 hex digits. Needs the package cryptography.

A trusted key is public, and a private one in its place is refused: what only checks must not be able to sign.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpatch.errors import BackendError, FormatError
from xpatch.patches import folders

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

Key = str | Path | bytes
"""The path of a key file, the key's text (PEM or 64 hex digits), or its 32 raw bytes."""

PUBLIC_SUFFIX = ".pub"
_FILE_BYTES_AT_MOST = 1 << 16
_HEX = re.compile(rb"[0-9a-fA-F]{64}")


def generate_key(path: str | Path) -> str:
    """Make a key pair: the private key at `path` (PEM, readable by its owner only), the public one at `path`.pub; returns the key id.

    Raises `FormatError` where one of the files exists or cannot be written, `BackendError` without cryptography.
    """
    ed25519, serialization = _ed25519(), _serialization()
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    places = {Path(path): (private, 0o600), Path(f"{path}{PUBLIC_SUFFIX}"): (public, 0o644)}
    for place in places:
        if os.path.lexists(place):
            raise FormatError(
                f"{place}: expected a free name for a key, found a file; keys are never replaced, choose another"
            )
    written: list[Path] = []
    try:
        for place, (text, mode) in places.items():
            _write_new(place, text, mode)
            written.append(place)
    except OSError as error:
        for place in written:
            place.unlink(missing_ok=True)
        raise FormatError(
            f"{path}: expected a place for a key, found: {error.strerror or error}; check the folder and its permissions"
        ) from None
    return key_id(key.public_key())


def private_key(source: Key) -> Ed25519PrivateKey:
    """The key to sign with. Raises `FormatError` for anything but an unencrypted ed25519 private key."""
    ed25519, serialization = _ed25519(), _serialization()
    text, where = _content(source, "private key")
    if len(text) == 32:
        return ed25519.Ed25519PrivateKey.from_private_bytes(text)
    try:
        key: Any = serialization.load_pem_private_key(text, password=None)
    except TypeError:
        raise FormatError(
            f"{where}: expected a private key without a password, found an encrypted one; decrypt it: openssl pkey -in KEY -out NEW"
        ) from None
    except Exception as error:  # not a key, or of a kind this build does not know
        raise _no_key(where, "private", error) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise FormatError(
            f"{where}: expected an ed25519 key, found {type(key).__name__}; make one with xpatch sign --generate-key FILE"
        )
    return key


def public_key(source: Key) -> Ed25519PublicKey:
    """A key to check with. Raises `FormatError` for anything but an ed25519 public key."""
    ed25519, serialization = _ed25519(), _serialization()
    text, where = _content(source, "public key")
    if b"PRIVATE KEY" in text:
        raise FormatError(
            f"{where}: expected a public key, found a private one; give the file that ends in {PUBLIC_SUFFIX}, and keep the other away"
        )
    try:
        key: Any = (
            ed25519.Ed25519PublicKey.from_public_bytes(text)
            if len(text) == 32
            else serialization.load_pem_public_key(text)
        )
    except Exception as error:  # not a key, or of a kind this build does not know
        raise _no_key(where, "public", error) from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise FormatError(
            f"{where}: expected an ed25519 key, found {type(key).__name__}; make one with xpatch sign --generate-key FILE"
        )
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """sha256 (hex) of the raw public key."""
    return hashlib.sha256(raw(key)).hexdigest()


def raw(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key."""
    serialization = _serialization()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _content(source: Any, what: str) -> tuple[bytes, str]:
    """The key's 32 raw bytes or PEM text, and how errors call it; the text of a key is never shown."""
    if isinstance(source, bytes):
        data, where = source, f"{what} given as bytes"
    elif isinstance(source, str) and (
        _HEX.fullmatch(source.strip().encode("utf-8", "replace")) or "-----BEGIN" in source
    ):
        data, where = source.encode("utf-8", "replace"), f"{what} given as text"
    elif isinstance(source, (str, Path)):
        too_large = f"expected a key of at most {_FILE_BYTES_AT_MOST} bytes, found more; is this a key file?"
        found = folders.read_file(Path(source), _FILE_BYTES_AT_MOST, too_large)
        if found is None:
            raise FormatError(f"{source}: expected a file with a {what}, found nothing; check the path")
        data, where = found, str(source)
    else:
        raise FormatError(
            f"{what}: expected a path, PEM text, 64 hex digits or 32 bytes, found {type(source).__name__}; give one of these"
        )
    if len(data) != 32 and _HEX.fullmatch(data.strip()):
        data = bytes.fromhex(data.strip().decode())
    return data, where


def _write_new(path: Path, text: bytes, mode: int) -> None:
    """A file that appears whole, and never in the place of another."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _no_key(where: str, kind: str, error: Exception) -> FormatError:
    return FormatError(
        f"{where}: expected an ed25519 {kind} key as PEM or 64 hex digits, found something else ({type(error).__name__}); "
        "make one with xpatch sign --generate-key FILE"
    )


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise BackendError('signatures need the package cryptography; run: pip install "xpatch[sign]"') from None
    return ed25519


def _serialization() -> Any:
    from cryptography.hazmat.primitives import serialization

    return serialization
