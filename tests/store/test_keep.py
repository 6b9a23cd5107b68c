"""Tidying up and looking after: what gc must never remove, what it must, and every kind of damage that verify must find."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpatch import FormatError, PatchSet, PatchStore
from xpatch.patches.store import CONFIG_FILE, TENSOR_FILE
from xpatch.store.sets import Sets, address

MakeSet = Callable[..., PatchSet]


def upload(store: PatchStore, patches: PatchSet) -> None:
    """What a publisher does before it moves the pointer; then it is killed."""
    store._sets.put(patches)


def folder(store: PatchStore, patches: PatchSet) -> Path:
    return Path(store.url) / address(patches.fingerprint)


def make_old(place: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    for path in [place, *place.rglob("*")]:
        os.utime(path, (then, then))


def test_gc_keeps_what_a_pointer_or_a_history_names(store: PatchStore, make_set: MakeSet) -> None:
    sets = [make_set(seed) for seed in range(4)]
    for patches in sets[:3]:
        store.publish(patches)
    store.rollback(steps=2)
    upload(store, sets[3])
    dry = store.gc(0, dry_run=True)
    assert dry.removed == (sets[3].fingerprint,) and len(store.list().sets) == 4
    done = store.gc(0)
    assert (done.removed, done.leftovers, done.kept, done.young) == (dry.removed, (), 3, 0)
    assert {item.fingerprint for item in store.list().sets} == {patches.fingerprint for patches in sets[:3]}
    assert store.verify().ok and store.rollback(to=sets[2]).after == sets[2].fingerprint
    assert store.gc(0).removed == ()


def test_gc_leaves_young_uploads_alone(store: PatchStore, make_set: MakeSet) -> None:
    store.publish(make_set(0))
    upload(store, make_set(1))
    for grace in (datetime.timedelta(hours=1), 3600, 3600.0):
        done = store.gc(grace)
        assert (done.removed, done.young) == ((), 1)
    assert store.publish(make_set(1)).number == 2


def test_gc_goes_by_age(local: PatchStore, make_set: MakeSet) -> None:
    local.publish(make_set(0))
    for seed, hours in ((1, 30), (2, 20)):
        upload(local, make_set(seed))
        make_old(folder(local, make_set(seed)), hours)
    make_old(folder(local, make_set(0)), 1000)
    assert local.gc().removed == (make_set(1).fingerprint,), "a day by default"
    assert "20" not in str(local.gc()) and local.gc().young == 1


def test_a_publisher_makes_an_old_upload_young_again(local: PatchStore, make_set: MakeSet) -> None:
    local.publish(make_set(0))
    upload(local, make_set(1))
    make_old(folder(local, make_set(1)), 48)
    upload(local, make_set(1))
    assert local.gc().removed == ()


@pytest.mark.parametrize("grace", [-1, float("nan"), "1h", None, True])
def test_gc_needs_a_time(local: PatchStore, make_set: MakeSet, grace: Any) -> None:
    local.publish(make_set())
    with pytest.raises(FormatError, match="grace"):
        local.gc(grace)


def test_gc_removes_what_interrupted_publishers_left(local: PatchStore, make_set: MakeSet) -> None:
    local.publish(make_set(0))
    root = Path(local.url)
    (root / "tmp" / "abc" / "half").mkdir(parents=True)
    (root / "tmp" / "abc" / "half" / TENSOR_FILE).write_bytes(b"half")
    (root / "tmp" / "entry").write_bytes(b"{")
    half = folder(local, make_set(1))
    half.mkdir(parents=True)
    (half / TENSOR_FILE).write_bytes(b"half")
    assert local.verify().ok and local.verify().leftovers == 3
    assert local.gc().young == 3 and half.exists()
    done = local.gc(0)
    assert (done.removed, sorted(done.leftovers)) == ((), [address(make_set(1).fingerprint), "tmp/abc", "tmp/entry"])
    assert local.verify().leftovers == 0 and not list((root / "tmp").iterdir())


def test_half_an_upload_is_not_a_set(store: PatchStore, make_set: MakeSet) -> None:
    """On a bucket the files come one by one; without the config, which comes last, there is nothing to see."""
    store.publish(make_set(0))
    store._place.create(f"{address(make_set(1).fingerprint)}/{TENSOR_FILE}", b"half")
    assert [item.fingerprint for item in store.list().sets] == [make_set(0).fingerprint]
    assert store.verify().ok and store.verify().leftovers == 1
    store.publish(make_set(1))
    assert store.get().fingerprint == make_set(1).fingerprint and store.verify().ok


def test_gc_gives_back_what_is_published_while_it_works(
    new_store: Callable[[], PatchStore], make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher found its set in place and moved the pointer after gc had read the histories."""
    store, other = new_store(), new_store()
    store.publish(make_set(0))
    upload(store, make_set(1))
    real = type(store._place).move

    def move(self: Any, source: str, target: str) -> bool:
        monkeypatch.setattr(type(store._place), "move", real)
        head = other.current()
        other._move("production", head, make_set(1).fingerprint, "publish", None, None, {})
        return real(self, source, target)

    monkeypatch.setattr(type(store._place), "move", move)
    assert store.gc(0).removed == ()
    assert other.get().fingerprint == make_set(1).fingerprint and other.verify().ok
    assert other.verify().leftovers == 0


def test_a_publisher_uploads_again_what_gc_took_meanwhile(
    new_store: Callable[[], PatchStore], make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = new_store(), new_store()
    store.publish(make_set(0))
    real = Sets.put

    def put(self: Sets, patches: PatchSet) -> None:
        monkeypatch.setattr(Sets, "put", real)
        real(self, patches)
        assert other.gc(0).removed == (patches.fingerprint,)

    monkeypatch.setattr(Sets, "put", put)
    store.publish(make_set(1))
    assert other.get().fingerprint == make_set(1).fingerprint and other.verify().ok


def test_what_a_killed_gc_set_aside_is_put_back(store: PatchStore, make_set: MakeSet) -> None:
    for seed in range(2):
        store.publish(make_set(seed))
    kept, loose = make_set(1), make_set(2)
    upload(store, loose)
    for patches in (kept, loose):
        store._place.move(address(patches.fingerprint), f"tmp/aside-{patches.fingerprint}-x")
    assert not store.verify().ok
    store.gc()
    assert store.verify().ok and store.verify().leftovers == 0 and store.get().fingerprint == kept.fingerprint


def test_gc_stops_at_a_damaged_history(local: PatchStore, make_set: MakeSet) -> None:
    local.publish(make_set(0))
    upload(local, make_set(1))
    (Path(local.url) / "history" / "production" / "00000001.json").write_text("{}")
    with pytest.raises(FormatError, match="00000001.json"):
        local.gc(0)
    assert folder(local, make_set(1)).exists()


def published(local: PatchStore, make_set: MakeSet) -> list[PatchSet]:
    sets = [make_set(seed) for seed in range(3)]
    for patches in sets:
        local.publish(patches)
    return sets


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_every_flipped_byte_of_a_set_is_found(local: PatchStore, make_set: MakeSet) -> None:
    patches = published(local, make_set)[1]
    where = folder(local, patches)
    config = (where / CONFIG_FILE).read_bytes()
    spots = [(TENSOR_FILE, at) for at in range(0, (where / TENSOR_FILE).stat().st_size, 29)]
    spots += [(CONFIG_FILE, config.index(b"REFUTES")), (CONFIG_FILE, config.index(b"fingerprint") + 20)]
    for name, at in spots:
        flip(where / name, at)
        found = local.verify()
        assert not found.ok and found.damage[0].kept_by == ("production",), (name, at)
        assert patches.fingerprint[:12] in str(found.damage[0])
        with pytest.raises(FormatError, match=f"{patches.fingerprint[:12]}.*publish|Publish"):
            local.get(patches.fingerprint)
        flip(where / name, at)
    assert local.verify().ok


def test_a_rollback_to_a_damaged_set_is_refused_and_publishing_it_again_repairs(
    local: PatchStore, make_set: MakeSet
) -> None:
    _, middle, last = published(local, make_set)
    flip(folder(local, middle) / TENSOR_FILE, -5)
    with pytest.raises(FormatError, match=middle.fingerprint[:12]):
        local.rollback()
    assert local.current().after == last.fingerprint
    assert len(local.list().sets) == 3
    local.publish(middle, "repair")
    assert local.verify().ok and local.rollback().after == middle.fingerprint


def test_a_set_under_a_wrong_name(local: PatchStore, make_set: MakeSet) -> None:
    _, middle, last = published(local, make_set)
    for file in folder(local, middle).iterdir():
        file.write_bytes((folder(local, last) / file.name).read_bytes())
    with pytest.raises(
        FormatError, match=f"expected the set {middle.fingerprint[:12]} .*found {last.fingerprint[:12]}"
    ):
        local.get(middle.fingerprint)
    assert len(local.verify().damage) == 1


def test_a_missing_set(local: PatchStore, make_set: MakeSet) -> None:
    _, middle, last = published(local, make_set)
    for patches in (middle, last):
        for file in folder(local, patches).iterdir():
            if patches is last or file.name == CONFIG_FILE:
                file.unlink()
    found = local.verify()
    assert {"found nothing" in str(damage) for damage in found.damage} == {True, False} and len(found.damage) == 2
    with pytest.raises(FormatError, match=r"patch_config.json: expected a file of a patch folder, found nothing"):
        local.get()


def entry(local: PatchStore, number: int) -> Path:
    return Path(local.url) / "history" / "production" / f"{number:08d}.json"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: path.write_bytes(b""), "expected JSON"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "expected JSON"),
        (lambda path: path.write_text("[]"), "entry: "),
        (lambda path: path.write_text(path.read_text().replace('"publish"', '"rollback"')), "expected sha256"),
        (lambda path: path.write_text(path.read_text().replace('"number": 2', '"number": 1')), "expected sha256"),
        (lambda path: path.write_bytes(path.with_name("00000001.json").read_bytes()), "expected move 2 .*found move 1"),
        (lambda path: path.unlink(), "expected move 2, found no such entry"),
    ],
)
def test_damaged_histories(local: PatchStore, make_set: MakeSet, harm: Callable[[Path], Any], told: str) -> None:
    published(local, make_set)
    harm(entry(local, 2))
    found = local.verify()
    assert len(found.damage) == 1 and found.damage[0].kept_by == ("production",)
    import re

    assert re.search(told, str(found)), str(found)
    assert local.get().fingerprint == make_set(2).fingerprint, "what is served does not hang on old entries"


def test_a_replaced_entry_breaks_the_chain(local: PatchStore, make_set: MakeSet, tmp_path: Path) -> None:
    published(local, make_set)
    other = PatchStore(tmp_path / "other")
    for seed in (5, 0):
        other.publish(make_set(seed))
    entry(local, 2).write_bytes(entry(other, 2).read_bytes())
    assert "expected move 2 to start from" in str(local.verify())


def test_a_damaged_head_stops_readers_and_writers(local: PatchStore, make_set: MakeSet) -> None:
    published(local, make_set)
    entry(local, 3).write_text("{")
    for act in (local.get, local.rollback, lambda: local.publish(make_set(7))):
        with pytest.raises(FormatError, match=r"00000003.json: expected JSON.*restore the file from a backup"):
            act()


def test_an_entry_of_a_newer_xpatch(local: PatchStore, make_set: MakeSet) -> None:
    published(local, make_set)
    content = json.loads(entry(local, 3).read_text())
    entry(local, 3).write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(FormatError, match="upgrade"):
        local.current()


def test_listing_goes_on_where_a_set_is_damaged(local: PatchStore, make_set: MakeSet) -> None:
    sets = published(local, make_set)
    (folder(local, sets[0]) / CONFIG_FILE).write_text("{")
    found = {item.fingerprint: item for item in local.list().sets}
    assert found[sets[0].fingerprint].problem is not None and found[sets[1].fingerprint].problem is None
    assert "damaged" in str(local.list())


def test_verify_reports_progress(store: PatchStore, make_set: MakeSet) -> None:
    published(store, make_set)
    seen: list[tuple[str, int, int]] = []
    store.verify(progress=lambda *values: seen.append(values))
    assert seen == [("verifying", done, 3) for done in (1, 2, 3)]
