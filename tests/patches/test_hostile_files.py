"""Files that are no files, grow without end, lead nowhere or have odd names: refused at once."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patches.conftest import soon
from xpatch.errors import FormatError
from xpatch.patches import folders, store
from xpatch.patches.limits import Limits
from xpatch.patches.types import PatchSet

MakeSet = Callable[..., PatchSet]
FILES = (store.CONFIG_FILE, store.TENSOR_FILE, store.SIGNATURE_FILE)
POSIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX files")


@POSIX
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "folder", "/dev/zero", "/dev/stdin", "/dev/tty"])
@pytest.mark.parametrize("as_url", [False, True], ids=["path", "url"])
def test_what_is_no_file_is_refused_without_waiting(folder: Path, name: str, kind: str, as_url: bool) -> None:
    place = folder / name
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        place.symlink_to("pipe")
    elif kind == "socket":
        before = os.getcwd()
        os.chdir(folder)  # socket names are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
        os.chdir(before)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(kind)
    if as_url:
        pytest.importorskip("fsspec")
    with (
        soon(),
        pytest.raises(FormatError, match=f"{name}: expected a regular file, found a folder, pipe, socket or device"),
    ):
        store.load(f"file://{folder}" if as_url else folder)


@POSIX
def test_links_to_regular_files_are_followed(folder: Path, tmp_path: Path) -> None:
    """As model hubs' caches and mounted config maps lay them out."""
    (tmp_path / "blobs").mkdir()
    for name in (store.CONFIG_FILE, store.TENSOR_FILE):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(Path("..") / "blobs" / name)
    assert len(store.load(folder)) == 2


@POSIX
def test_links_that_lead_nowhere(folder: Path) -> None:
    place = folder / store.TENSOR_FILE
    place.unlink()
    place.symlink_to("nothing")
    with pytest.raises(FormatError, match="expected a file of a patch folder, found nothing"):
        store.load(folder)
    place.unlink()
    place.symlink_to(place.name)
    with pytest.raises(FormatError, match="expected a readable file, found Too many levels of symbolic links"):
        store.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_an_enormous_file_is_refused_unread(folder: Path, name: str) -> None:
    with open(folder / name, "ab") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no room
    with soon(), pytest.raises(FormatError, match=rf"{name}: expected at most .*\(limit '"):
        store.load(folder)


@pytest.mark.parametrize("change", [b"x", None], ids=["grows", "shrinks"])
@pytest.mark.parametrize("name", [store.CONFIG_FILE, store.TENSOR_FILE])
def test_a_file_that_changes_while_it_is_read(
    folder: Path, name: str, change: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    def late(number: int) -> os.stat_result:
        found = real(number)
        size = (folder / name).stat().st_size
        if found.st_size == size:
            with open(folder / name, "r+b") as file:
                file.truncate(size - 1 if change is None else size + 1)
        return found

    monkeypatch.setattr(folders.os, "fstat", late)
    with pytest.raises(FormatError, match="found another size while reading; it is being written, try again"):
        store.load(folder)


def test_a_file_that_keeps_growing_ends(folder: Path) -> None:
    """A writer appends without pause: every load ends, and never with a set."""
    stop = threading.Event()

    def write() -> None:
        with open(folder / store.TENSOR_FILE, "ab", buffering=0) as file:
            while not stop.is_set() and file.tell() < 64 << 20:
                file.write(b"\0" * 4096)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with soon(20):
            for _ in range(20):
                time.sleep(0.002)
                with pytest.raises(FormatError):
                    store.load(folder, limits=Limits(header_bytes=1 << 16))
    finally:
        stop.set()
        writer.join()


def test_files_in_memory(folder: Path) -> None:
    files = {name: (folder / name).read_bytes() for name in (store.CONFIG_FILE, store.TENSOR_FILE)}
    assert store.load(files).fingerprint == store.load(folder).fingerprint and store.load(files).name is None
    with pytest.raises(FormatError, match="patch_model.safetensors: expected a file of a patch folder, found nothing"):
        store.load({store.CONFIG_FILE: files[store.CONFIG_FILE]})
    with pytest.raises(FormatError, match="patch_config.json: expected bytes, found str"):
        store.load({**files, store.CONFIG_FILE: "{}"})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "C:x", "..", ".", " ", "x\n", "x" * 201, "\ud800"])
def test_sets_cannot_be_saved_under_names_that_are_no_file_names(make_set: MakeSet, tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="patch set, name: expected"):
        store.save(make_set(["a"], name=name), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@POSIX
def test_a_folder_whose_name_is_no_set_name_loads_without_one(make_set: MakeSet, tmp_path: Path) -> None:
    odd = tmp_path / "a\\b\x1b"
    store.save(make_set(["a"]), tmp_path / "x")
    (tmp_path / "x").rename(odd)
    assert store.load(odd).name is None
