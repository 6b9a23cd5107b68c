"""Where a store lies: the few things a store needs from a folder or a bucket, and the choice between the two."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from xpatch.errors import FormatError
from xpatch.patches.folders import is_url
from xpatch.patches.limits import Limits
from xpatch.patches.types import PatchSet

TEMPORARY = "tmp"


class Place(Protocol):
    """A folder or bucket. Paths are relative to it, with "/". Every error that is not about content is a `FormatError`."""

    def where(self, path: str = "") -> str:
        """The address of a path as messages show it and as `xpatch.load` takes it."""

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder, sorted; nothing where it does not exist."""

    def files(self, folder: str) -> list[str]:
        """Every file below a folder, as paths of the place, sorted."""

    def read(self, paths: Iterable[str]) -> dict[str, bytes]:
        """The bytes of those files that exist."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that must not exist yet, whole or not at all; False where it exists with other bytes."""

    def put(self, folder: str, patches: PatchSet) -> None:
        """Write a set as a patch folder; nobody sees half of it. A whole folder that is there already may stay."""

    def load(self, folder: str, limits: Limits) -> PatchSet:
        """`xpatch.load` for a patch folder. Raises `FormatError` for anything missing, damaged or too large."""

    def replace(self, path: str, data: bytes) -> None:
        """Write a file, new or not, whole or not at all."""

    def touch(self, folder: str) -> None:
        """Make a patch folder young again."""

    def age(self, path: str) -> float | None:
        """Seconds since a file, or the newest file of a folder, was written; None where that is not known."""

    def move(self, source: str, target: str) -> bool:
        """Move a folder to a free name; False where `source` is gone."""

    def remove(self, path: str) -> None:
        """Delete a file or folder, if it is there."""

    def prepare(self, mark: str) -> None:
        """Called before the first write, with the mark in place: find out what the place can promise."""

    def check_writable(self) -> None:
        """Raise `FormatError` early where it is plain that nothing can be written."""


def open_place(url: str | Path, options: Mapping[str, Any]) -> Place:
    """A local folder or an fsspec URL as a place. Raises `FormatError` for an address that can be no store."""
    from xpatch.store.local import LocalPlace
    from xpatch.store.remote import RemotePlace

    text = os.fspath(url) if isinstance(url, (str, Path)) else None
    if not text or not text.strip():
        raise FormatError(
            f"PatchStore(url): expected a folder or an fsspec URL such as s3://bucket/path, found {url!r}"
        )
    if is_url(text) and not text.startswith(("file://", "local://")):
        if "::" in text:
            raise FormatError(
                f"{text}: expected one plain address, found a chain; a cached or packed view cannot tell which move is the newest. "
                "Give the address behind it"
            )
        return RemotePlace(text, options)
    if options:
        raise FormatError(
            f"{text}: storage options ({', '.join(sorted(options))}) go with a URL such as s3://bucket/path; "
            "leave them out for a local folder"
        )
    return LocalPlace(Path(url2pathname(urlsplit(text).path) if is_url(text) else text))
