"""Where patch folders lie: local folders replaced as a whole, and fsspec URLs (hf://, s3://, memory://)."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xpatch.errors import BackendError, FormatError

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+(::|://)")  # two letters or more: C:\ is a path


def is_url(folder: str | Path) -> bool:
    """Whether `folder` is a URL rather than a local path."""
    return isinstance(folder, str) and bool(_URL.match(folder))


def name_of(folder: str | Path) -> str | None:
    """The last component of a path or URL; None where it has none."""
    if is_url(folder):
        return str(folder).rstrip("/").rsplit("/", 1)[-1] or None
    return Path(folder).resolve().name or None


def read(folder: str | Path, names: Iterable[str]) -> dict[str, bytes]:
    """The named files of a folder. Raises `FormatError` naming what is missing or cannot be read."""
    if is_url(folder):
        return _read_url(str(folder), names)
    root = Path(folder)
    try:
        found = None if root.is_dir() else "a file" if root.exists() else "nothing"
    except OSError as error:  # a folder above it may not be looked into
        found = error.strerror
    if found is not None:
        raise FormatError(f"{root}: expected a patch folder, found {found}; give the folder that xpatch.save wrote")
    files = {}
    for name in names:
        try:
            files[name] = (root / name).read_bytes()
        except FileNotFoundError:
            raise _missing(root / name) from None
        except OSError as error:
            raise FormatError(
                f"{root / name}: expected a readable file, found {error.strerror}; check its permissions"
            ) from None
    return files


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


def _check_free(folder: Path, target: Path, mark: str) -> None:
    if target.exists() and not target.is_dir():
        raise FormatError(f"{folder}: expected a patch folder or a free name, found a file; choose another name")
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        raise FormatError(
            f"{folder}: expected a patch folder or an empty one, found other files and no {mark}; choose another folder"
        )


def _read_url(url: str, names: Iterable[str]) -> dict[str, bytes]:
    system, root = _filesystem(url)
    files = {}
    for name in names:
        try:
            files[name] = system.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            raise _missing(f"{url.rstrip('/')}/{name}") from None
        except (OSError, ValueError) as error:
            raise FormatError(
                f"{url.rstrip('/')}/{name}: expected a readable file, found: {error}; check address and rights"
            ) from None
    return files


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


def _missing(file: object) -> FormatError:
    return FormatError(
        f"{file}: expected a file of a patch folder, found nothing; give the folder that xpatch.save wrote, whole"
    )
