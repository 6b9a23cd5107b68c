"""A folder that is written as a whole, or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xpatch.errors import XpatchError


@contextlib.contextmanager
def written_together(folder: Path, mark: str) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end, or is removed on any failure.

    mark: the file that tells an earlier export of the same kind, which is replaced as a whole. Raises `XpatchError` where `folder` is
    something else or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise XpatchError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise XpatchError(f"{folder} holds files of something else (no {mark}); name a new or empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise XpatchError(f"{folder} cannot be written: {error}; name a folder you may write to") from None
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
