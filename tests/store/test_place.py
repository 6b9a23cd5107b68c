"""Places a store can and cannot be in: what an address must be, what is refused, what a bucket without conditions promises."""

from __future__ import annotations

import builtins
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from xpatch import BackendError, ConflictError, FormatError, MismatchError, PatchSet, PatchStore

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

MakeSet = Callable[..., PatchSet]
COUNTER = itertools.count()


def test_nothing_is_made_before_the_first_publish(tmp_path: Path, make_set: MakeSet) -> None:
    store = PatchStore(tmp_path / "deep" / "store")
    for ask in (store.list, store.get, store.history, store.verify, store.gc, store.rollback, store.current):
        with pytest.raises(FormatError, match="expected a patch store, found nothing; check the address, or publish"):
            ask()
    assert not list(tmp_path.iterdir())
    other = PatchStore(tmp_path / "deep" / "store")
    other.publish(make_set())
    assert store.get().fingerprint == make_set().fingerprint, "seen without opening it again"


def test_layout(tmp_path: Path, make_set: MakeSet) -> None:
    PatchStore(tmp_path).publish(make_set(name="fixes"))
    key = make_set().fingerprint
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    folder = f"sets/{key[:2]}/{key}"
    assert found == {
        "xpatch_store.json",
        "history/production/00000001.json",
        *(f"{folder}/{name}" for name in ("README.md", "patch_config.json", "patch_model.safetensors")),
    }


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        FormatError, match=r"expected a patch store or an empty place, found 'notes.txt' and no xpatch_store"
    ):
        PatchStore(tmp_path)
    with pytest.raises(FormatError, match="expected a folder for a patch store, found a file"):
        PatchStore(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        ('{"format_version": 2}', "upgrade"),
        ("{}", "expected the mark"),
        ("x", "expected the mark"),
        ("[1]", "expected the mark"),
    ],
)
def test_marks(tmp_path: Path, mark: str, told: str) -> None:
    (tmp_path / "xpatch_store.json").write_text(mark)
    with pytest.raises(FormatError, match=told):
        PatchStore(tmp_path)


@pytest.mark.parametrize("url", ["", " ", None, 3])
def test_no_address(url: Any) -> None:
    with pytest.raises(FormatError, match="expected a folder or an fsspec URL"):
        PatchStore(url)


def test_addresses(tmp_path: Path, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = PatchStore("store")
    store.publish(make_set())
    monkeypatch.chdir("/")
    assert store.get() and store.url == str(tmp_path / "store"), "a working directory that changes does no harm"
    assert PatchStore((tmp_path / "store").as_uri()).get().fingerprint == make_set().fingerprint
    with pytest.raises(FormatError, match="storage options .endpoint_url. go with a URL"):
        PatchStore(tmp_path / "store", endpoint_url="http://x")
    with pytest.raises(FormatError, match="expected one plain address, found a chain"):
        PatchStore("simplecache::memory://x")
    with pytest.raises(FormatError, match="expected a folder or a URL that fsspec knows"):
        PatchStore("nosuch://bucket/x")


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_set: MakeSet) -> None:
    real = builtins.__import__

    def no_fsspec(name: str, *args: Any, **more: Any) -> Any:
        if name.split(".")[0] == "fsspec":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", no_fsspec)
    with pytest.raises(BackendError, match=r"xpatch\[remote\]"):
        PatchStore("memory://x")
    PatchStore(tmp_path / "s").publish(make_set())


def test_a_folder_that_may_not_be_written(tmp_path: Path, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)  # whoever runs the tests may write anywhere
    with pytest.raises(FormatError, match="expected a folder that can be written, found no permission"):
        PatchStore(tmp_path / "store").publish(make_set())
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="expected a folder that can be read and written, found: Not a directory"):
        PatchStore(tmp_path / "file" / "store")


def test_a_full_disk(local: PatchStore, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    local.publish(make_set(0))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    with pytest.raises(FormatError, match=r"00000002.json: .*No space left on device.*free space"):
        local.publish(make_set(1))
    monkeypatch.undo()
    assert local.current().number == 1 and local.verify().leftovers == 0 and local.publish(make_set(1)).number == 2


def test_a_bucket_that_is_not_there(s3_options: dict[str, Any], make_set: MakeSet) -> None:
    store = PatchStore("s3://no-such-bucket/store", **s3_options)
    with pytest.raises(
        FormatError, match=r"s3://no-such-bucket/store/xpatch_store.json: expected a place that can be written"
    ):
        store.publish(make_set())


def test_a_server_that_is_not_there() -> None:
    pytest.importorskip("s3fs")
    options = {"key": "x", "secret": "x", "endpoint_url": "http://127.0.0.1:9"}
    quick = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}
    with pytest.raises(FormatError, match=r"s3://bucket/x.*expected a place that can be .*reachable"):
        PatchStore("s3://bucket/x", storage_options={**options, **quick})


class Other(MemoryFileSystem):
    """Memory under another protocol, with a place of its own."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol("memory://" + path.split("://", 1)[-1])


class Plain(Other):
    protocol = "plain"


class Deaf(Other):
    """A server that takes the condition and ignores it."""

    protocol = ("deaf", "s3")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        super().pipe_file(path, value)


class Lossy(Other):
    """A server whose answer to the first write of a history entry is lost after it has done its work."""

    protocol = ("lossy", "s3")
    lost = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        super().pipe_file(path, value, mode=mode)
        if "/history/" in path and not type(self).lost:
            type(self).lost += 1
            raise OSError("connection reset by peer")


class Busy(Other):
    """A server that turns down the first try, as S3 does while another conditional request for the key is under way."""

    protocol = ("busy", "s3")
    refused = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        if "/history/" in path and not type(self).refused:
            type(self).refused += 1
            raise OSError("ConditionalRequestConflict")
        super().pipe_file(path, value, mode=mode)


for kind in (Plain, Deaf, Lossy, Busy):
    fsspec.register_implementation(
        kind.protocol if isinstance(kind.protocol, str) else kind.protocol[0], kind, clobber=True
    )


@pytest.mark.parametrize("protocol", ["plain", "deaf"])
def test_places_without_exclusive_create_say_so_and_serve_one_writer(protocol: str, make_set: MakeSet) -> None:
    url = f"{protocol}://store-{next(COUNTER)}"
    store = PatchStore(url)
    with pytest.warns(UserWarning, match=f"{url}: this place has no exclusive create.*one process publish at a time"):
        store.publish(make_set(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.publish(make_set(1))
        store.rollback()
        assert store.verify().ok and len(store.history()) == 3
        with pytest.raises(ConflictError):
            store.publish(make_set(2), expect=make_set(1))


@pytest.mark.parametrize("protocol", ["lossy", "busy"])
def test_an_answer_that_is_lost_or_put_off(protocol: str, make_set: MakeSet) -> None:
    store = PatchStore(f"{protocol}://store-{next(COUNTER)}")
    assert store.publish(make_set(0)).number == 1
    assert [move.after for move in store.history()] == [make_set(0).fingerprint]
    assert (Lossy.lost if protocol == "lossy" else Busy.refused) == 1, "it happened"


def test_s3_refuses_a_second_create(s3_options: dict[str, Any]) -> None:
    """What the design rests on, asked of the server itself."""
    from xpatch.store.remote import RemotePlace

    place = RemotePlace(f"s3://patches/store-{next(COUNTER)}x", s3_options)
    assert place.create("entry", b"one") and place.create("entry", b"one"), (
        "the same bytes are ours: an answer was lost"
    )
    assert not place.create("entry", b"two") and place.read(["entry"]) == {"entry": b"one"}
    place.prepare("entry")
    assert place.exclusive


def test_limits_and_keys(tmp_path: Path, make_set: MakeSet) -> None:
    from xpatch.patches.limits import Limits

    PatchStore(tmp_path).publish(make_set(ids=("a", "b")))
    with pytest.raises(FormatError, match="limit 'edits'"):
        PatchStore(tmp_path, limits=Limits(edits=1)).get()
    with pytest.raises((FormatError, MismatchError), match="key|sign"):
        PatchStore(tmp_path).get(trusted_keys=[])
