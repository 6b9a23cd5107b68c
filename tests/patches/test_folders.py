"""Where folders lie: replaced as a whole, never over other people's files, local or behind a URL."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xpatch.errors import BackendError, FormatError
from xpatch.patches import store
from xpatch.patches.types import PatchSet

MakeSet = Callable[..., PatchSet]


def test_overwriting_replaces_the_set_and_keeps_other_files(make_set: MakeSet, tmp_path: Path) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    (folder / "notes.txt").write_text("mine")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.bin").write_bytes(b"1")
    store.save(make_set(["b", "c"]), folder)
    assert len(store.load(folder)) == 2
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "onnx" / "model.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_link_keeps_pointing_at_its_folder(make_set: MakeSet, tmp_path: Path) -> None:
    store.save(make_set(["a"]), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    store.save(make_set(["b"]), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and store.load(tmp_path / "real").edit("b")


def test_the_working_folder_can_be_written(make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for id in "ab":
        store.save(make_set([id]), ".")
        assert store.load(".").edit(id) and store.load(".").name == "here"
    assert sorted(os.listdir()) == ["README.md", "patch_config.json", "patch_model.safetensors"]
    assert os.listdir(tmp_path) == ["here"]


def test_what_is_no_patch_folder_is_not_overwritten(make_set: MakeSet, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    store.save(make_set(["a"]), tmp_path / "mine")  # an empty folder is free
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    with pytest.raises(
        FormatError, match="work: expected a patch folder or an empty one, found other files and no patch_config.json"
    ):
        store.save(make_set(["a"]), tmp_path / "work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="file: expected a patch folder or a free name, found a file"):
        store.save(make_set(["a"]), tmp_path / "file")
    with pytest.raises(FormatError, match="expected a folder that can be written"):
        store.save(make_set(["a"]), tmp_path / "file" / "below")
    assert os.listdir(tmp_path / "work") == ["thesis.tex"] and (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("failing", ["mkdir", "rename"])
def test_a_failed_save_leaves_the_old_folder(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    real = getattr(Path, failing)

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.name.endswith(".new"):
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)

    monkeypatch.setattr(Path, failing, refuse)
    with pytest.raises(
        FormatError, match=r"x: expected a folder that can be written, found: Permission denied; check the permissions"
    ):
        store.save(make_set(["b"]), folder)
    monkeypatch.undo()
    assert store.load(folder).edit("a") and [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.fixture
def ordinary_user(tmp_path: Path) -> Iterator[None]:
    """Root may write everywhere, so as root these tests act as another user."""
    if not hasattr(os, "seteuid"):
        pytest.skip("needs POSIX permissions")
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


@pytest.mark.usefixtures("ordinary_user")
def test_no_permission(make_set: MakeSet) -> None:
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folder is closed to other users
        locked = Path(outside) / "locked"
        locked.mkdir()
        for mode in (0o500, 0o000):
            locked.chmod(mode)
            with pytest.raises(
                FormatError, match=r"x: expected a folder that can be written, found: Permission denied; check"
            ):
                store.save(make_set(["a"]), locked / "x")
        with pytest.raises(FormatError, match="x: expected a patch folder, found Permission denied"):
            store.load(locked / "x")
        locked.chmod(0o700)
        folder = store.save(make_set(["a"]), locked / "x")
        (folder / store.TENSOR_FILE).chmod(0o000)
        with pytest.raises(
            FormatError, match="patch_model.safetensors: expected a readable file, found Permission denied"
        ):
            store.load(folder)


def test_urls(make_set: MakeSet) -> None:
    fsspec = pytest.importorskip("fsspec")
    patches = make_set(["a"])
    url = "memory://bucket/fixes"
    assert store.save(patches, url) == url
    loaded = store.load(url + "/")
    assert loaded.fingerprint == patches.fingerprint and loaded.name == "fixes"
    store.save(make_set(["b"]), url)
    assert store.load(url).edit("b")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/other/file.txt", b"x")
    with pytest.raises(FormatError, match="memory://other: expected a patch folder or a free name"):
        store.save(patches, "memory://other")
    memory.rm_file(f"/bucket/fixes/{store.TENSOR_FILE}")
    with pytest.raises(
        FormatError, match="memory://bucket/fixes/patch_model.safetensors: expected a file of a patch folder"
    ):
        store.load(url)
    with pytest.raises(FormatError, match="expected a local path or a URL that fsspec knows"):
        store.load("nosuchprotocol://a/b")


def test_local_urls_are_local_folders(make_set: MakeSet, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    store.save(make_set(["a"]), f"file://{tmp_path}/x")
    assert len(store.load(tmp_path / "x")) == 1


def test_missing_packages_are_named(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(BackendError, match=r'needs fsspec; run: pip install "xpatch\[remote\]"'):
        store.load("hf://someone/fixes")
    with pytest.raises(BackendError):
        store.save(make_set(["a"]), "memory://x/y")


def test_an_old_signature_does_not_stay_beside_a_new_set(make_set: MakeSet, tmp_path: Path) -> None:
    """Other files of a replaced folder stay, but a signature is for the set that was there."""
    for place in (tmp_path / "x", f"file://{tmp_path}/y"):
        folder = store.save(make_set(["a"]), place)
        local = tmp_path / str(place)[-1]
        (local / store.SIGNATURE_FILE).write_text('{"signature_version": 1, "signatures": []}')
        (local / "notes.txt").write_text("mine")
        store.save(make_set(["b"]), folder)
        assert not (local / store.SIGNATURE_FILE).exists() and (local / "notes.txt").exists()


def test_a_store_that_calls_missing_files_forbidden(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Object stores that may not be listed answer 403 for a missing file: an unsigned set must still load."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    url = store.save(make_set(["a"]), "memory://forbidden/x")
    real = type(memory).cat_file

    def forbid(self: Any, path: str, *args: Any, **options: Any) -> Any:
        if not self.exists(path):
            raise PermissionError("Forbidden")
        return real(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "cat_file", forbid)
    assert len(store.load(url)) == 1
    memory.rm_file(f"/forbidden/x/{store.TENSOR_FILE}")
    with pytest.raises(FormatError, match="expected a readable file, found: Forbidden; check address and rights"):
        store.load(url)


@pytest.mark.parametrize("error", [RuntimeError("odd"), KeyError("Body"), TimeoutError("late"), ValueError("no")])
def test_errors_of_file_systems_are_told_as_one(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    url = store.save(make_set(["a"]), "memory://errors/x")

    def fail(self: Any, *args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(type(memory), "cat_file", fail)
    with pytest.raises(FormatError, match="memory://errors/x/patch_config.json: expected a readable file, found"):
        store.load(url)
