"""Where patch folders lie: local folders replaced as a whole, and fsspec URLs (hf://, s3://, memory://)."""

from __future__ import annotations

import os
import re
import shutil
import stat
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from xpatch.errors import BackendError, FormatError
from xpatch.patches.jsonl import shorten
from xpatch.patches.names import is_safe

_PIECE = 1 << 30
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+(::|://)")  # two letters or more: C:\ is a path


class Reader(Protocol):
    """Reads one file of a patch folder, at most `at_most` bytes of it.

    Raises `FormatError` for a larger file (`too_large` says what was expected), a missing one unless `optional` (then None), and
    whatever cannot be read.
    """

    def __call__(self, name: str, at_most: int, too_large: str, *, optional: bool = False) -> bytes | None: ...


def is_url(folder: str | Path) -> bool:
    """Whether `folder` is a URL rather than a local path."""
    return isinstance(folder, str) and bool(_URL.match(folder))


def name_of(folder: str | Path) -> str | None:
    """The last component of a path or URL; None where it has none, or one that is no name for a set."""
    last = str(folder).rstrip("/").rsplit("/", 1)[-1] if is_url(folder) else Path(folder).resolve().name
    return last if last and is_safe(last) else None


def reader(folder: str | Path | Mapping[str, bytes]) -> Reader:
    """How to read the files of a folder, a URL, or a mapping from file names to bytes.

    Raises `FormatError` where there is no folder.
    """
    if isinstance(folder, Mapping):
        return _of_mapping(folder)
    if is_url(folder):
        system, root = _filesystem(str(folder))
        if {"file", "local"}.isdisjoint([system.protocol] if isinstance(system.protocol, str) else system.protocol):
            return _of_url(str(folder).rstrip("/"), system, root)
        folder = root
    root_folder = Path(folder)
    try:
        found = None if root_folder.is_dir() else "a file" if root_folder.exists() else "nothing"
    except OSError as error:  # a folder above it may not be looked into
        found = error.strerror
    if found is not None:
        raise FormatError(f"{folder}: expected a patch folder, found {found}; give the folder that xpatch.save wrote")
    return _of_folder(root_folder)


def read_file(path: Path, at_most: int, too_large: str) -> bytes | None:
    """A regular file's bytes, None where there is none. Links are followed: model hubs and config maps keep files behind them.

    Never waits: pipes, devices and sockets are refused without opening them, and a file that changes while it is read is
    refused. Raises `FormatError`; `too_large` says what is expected of a file above `at_most` bytes.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _irregular(path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
        with open(os.open(path, flags), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):  # replaced since it was looked at
                raise _irregular(path)
            if status.st_size > at_most:
                raise FormatError(f"{path}: {too_large}")
            data = _read_all(file, status.st_size + 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: expected a readable file, found {told}; check its permissions") from None
    if len(data) != status.st_size:
        raise FormatError(
            f"{path}: expected a file of {status.st_size} bytes, found another size while reading; it is being written, try again"
        )
    return data


def missing(file: object) -> FormatError:
    """The error for a file that a patch folder must have."""
    return FormatError(
        f"{file}: expected a file of a patch folder, found nothing; give the folder that xpatch.save wrote, whole"
    )


def write_local(folder: Path, files: Mapping[str, bytes], *, mark: str) -> None:
    """Write a folder beside its place, then rename it into place; `mark` is the file that tells a patch folder.

    Other files of the folder it replaces move into the new one. A folder this process works in cannot be moved away under it:
    there the files are replaced one by one, `mark` last. Raises `FormatError` where `folder` is something else or
    cannot be written; what was there stays.
    """
    target = folder.resolve()  # a link keeps pointing at the folder it names
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.new"
    old = temporary.with_suffix(".old")
    try:
        _check_free(folder, target, mark)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if Path.cwd().is_relative_to(target):
            for name in sorted(files, key=lambda name: name == mark):
                (temporary / name).replace(target / name)
            temporary.rmdir()
            return
        if target.is_dir():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        if old.exists():
            for item in old.iterdir():
                if item.name not in files:
                    item.rename(target / item.name)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise FormatError(
            f"{folder}: expected a folder that can be written, found: {error.strerror or error}; "
            f"check the permissions and free space of {target.parent}, or choose another folder"
        ) from None


def write_url(url: str, files: Mapping[str, bytes], *, mark: str) -> None:
    """Write files under a URL, `mark` last."""
    system, root = _filesystem(url)
    try:
        if system.exists(root) and (
            system.isfile(root) or (system.ls(root, detail=False) and not system.exists(f"{root}/{mark}"))
        ):
            raise FormatError(
                f"{url}: expected a patch folder or a free name, found other files and no {mark}; choose another folder"
            )
        system.makedirs(root, exist_ok=True)
        for name in sorted(files, key=lambda name: name == mark):
            system.pipe_file(f"{root}/{name}", files[name])
    except (OSError, ValueError, NotImplementedError) as error:
        raise FormatError(
            f"{url}: expected a place that can be written, found: {error}; check the address and your rights"
        ) from None


def write_file(folder: str | Path, name: str, data: bytes) -> None:
    """Write one file of a folder or URL that exists, whole or not at all. Raises `FormatError` where it cannot be written."""
    try:
        if is_url(folder):
            system, root = _filesystem(str(folder))
            system.pipe_file(f"{root}/{name}", data)
            return
        temporary = Path(folder) / f".{name}.{uuid.uuid4().hex[:8]}.new"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(Path(folder) / name)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError, NotImplementedError) as error:
        told = getattr(error, "strerror", None) or error
        raise FormatError(
            f"{folder}: expected a folder in which {name} can be written, found: {told}; check address and permissions"
        ) from None


def discard(folder: str | Path, name: str) -> None:
    """Remove one file of a folder or URL where it exists and may be removed."""
    with suppress(OSError, ValueError, NotImplementedError):
        if is_url(folder):
            system, root = _filesystem(str(folder))
            system.rm_file(f"{root}/{name}")
        else:
            (Path(folder) / name).unlink()


def _check_free(folder: Path, target: Path, mark: str) -> None:
    if target.exists() and not target.is_dir():
        raise FormatError(f"{folder}: expected a patch folder or a free name, found a file; choose another name")
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        raise FormatError(
            f"{folder}: expected a patch folder or an empty one, found other files and no {mark}; choose another folder"
        )


def _of_folder(root: Path) -> Reader:
    def read(name: str, at_most: int, too_large: str, *, optional: bool = False) -> bytes | None:
        data = read_file(root / name, at_most, too_large)
        if data is None and not optional:
            raise missing(root / name)
        return data

    return read


def _of_mapping(files: Mapping[str, bytes]) -> Reader:
    def read(name: str, at_most: int, too_large: str, *, optional: bool = False) -> bytes | None:
        data = files.get(name)
        if data is None and optional:
            return None
        if data is None:
            raise missing(name)
        if not isinstance(data, bytes):
            raise FormatError(f"{name}: expected bytes, found {type(data).__name__}; give each file's content as bytes")
        if len(data) > at_most:
            raise FormatError(f"{name}: {too_large}")
        return data

    return read


def _of_url(url: str, system: Any, root: str) -> Reader:
    def read(name: str, at_most: int, too_large: str, *, optional: bool = False) -> bytes | None:
        try:
            data = _fetched(system, f"{root}/{name}", at_most + 1)
        except (FileNotFoundError, PermissionError) as error:
            if optional:  # object stores that may not be listed call a missing file forbidden
                return None
            if isinstance(error, FileNotFoundError):
                raise missing(f"{url}/{name}") from None
            raise _unreadable(url, name, error) from None
        except ImportError as error:
            raise BackendError(f"{url}/{name}: a package for this address is missing: {error}; install it") from None
        except Exception as error:  # each file system has errors of its own
            raise _unreadable(url, name, error) from None
        if len(data) > at_most:
            raise FormatError(f"{url}/{name}: {too_large}")
        return data

    return read


def _fetched(system: Any, path: str, at_most: int) -> bytes:
    """At most so many bytes. Over HTTP as a stream, for a server may answer a range with the whole file."""
    if {"http", "https"}.isdisjoint([system.protocol] if isinstance(system.protocol, str) else system.protocol):
        return bytes(system.cat_file(path, start=0, end=at_most))
    with system.open(path, "rb") as file:
        return _read_all(file, at_most)


def _read_all(file: Any, at_most: int) -> bytes:
    """Up to `at_most` bytes, in pieces: `read` may return fewer than asked for, and sets aside as many as asked for."""
    pieces, left = [], at_most
    while left > 0 and (piece := file.read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _unreadable(url: str, name: str, error: Exception) -> FormatError:
    told = shorten(" ".join(str(error).split()) or type(error).__name__, 300)
    return FormatError(f"{url}/{name}: expected a readable file, found: {told}; check address and rights")


def _irregular(path: Path) -> FormatError:
    return FormatError(
        f"{path}: expected a regular file, found a folder, pipe, socket or device; do not trust this folder, restore it"
    )


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise BackendError(f'{url}: reading and writing URLs needs fsspec; run: pip install "xpatch[remote]"') from None
    try:
        system, root = url_to_fs(url)
    except ImportError as error:
        raise BackendError(
            f'{url}: a package for this address is missing: {error}; for hf:// run: pip install "xpatch[remote]"'
        ) from None
    except (ValueError, OSError) as error:
        raise FormatError(
            f"{url}: expected a local path or a URL that fsspec knows, found: {error}; check the address"
        ) from None
    return system, str(root).rstrip("/")
