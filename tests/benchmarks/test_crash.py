"""The crash test, in short, and that it can fail: a store that loses or tears something is counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from xpatch import PatchStore
from xpatch.benchmarks import crash
from xpatch.store.sets import address


def test_a_publisher_killed_twenty_times_loses_nothing(tmp_path: Path) -> None:
    found = crash.run(writes=50, seed=3, folder=tmp_path / "store", progress=False)
    assert (found["lost"], found["torn"], found["leftovers_left"]) == (0, 0, 0), found
    assert found["writes"] == 50 and found["kills"] >= 5 and found["inside"] >= found["kills"] / 2, found
    store = PatchStore(tmp_path / "store")
    assert store.verify().ok and len(store.history()) == len(store.list().sets) <= 50


@pytest.fixture
def tally(tmp_path: Path) -> crash.Tally:
    """Three publishes that came back."""
    told = crash.Tally(seed=0)
    for number in range(3):
        patches = crash.patch_set(0, number)
        PatchStore(tmp_path / "store").publish(patches, message=str(number))
        told.acknowledged[number] = patches.fingerprint
    return told


def folder(tmp_path: Path, tally: crash.Tally, number: int) -> Path:
    return tmp_path / "store" / address(tally.acknowledged[number])


def test_a_sound_store_counts_nothing(tmp_path: Path, tally: crash.Tally) -> None:
    crash.check(tmp_path / "store", tally, collect=True)
    assert (tally.torn, tally.lost, tally.left, tally.unacknowledged) == (0, set(), 0, 0)


def test_a_lost_set_counts(tmp_path: Path, tally: crash.Tally) -> None:
    shutil.rmtree(folder(tmp_path, tally, 1))
    crash.check(tmp_path / "store", tally, collect=False)
    assert tally.lost == {1} and tally.torn == 1


def test_a_lost_move_counts(tmp_path: Path, tally: crash.Tally) -> None:
    (tmp_path / "store" / "history" / "production" / "00000003.json").unlink()
    crash.check(tmp_path / "store", tally, collect=False)
    assert tally.lost == {2}


def test_a_torn_pointer_counts(tmp_path: Path, tally: crash.Tally) -> None:
    entry = tmp_path / "store" / "history" / "production" / "00000003.json"
    entry.write_bytes(entry.read_bytes()[:40])
    crash.check(tmp_path / "store", tally, collect=False)
    assert tally.torn == 1 and tally.lost == {0, 1, 2}


def test_a_torn_set_counts(tmp_path: Path, tally: crash.Tally) -> None:
    tensors = folder(tmp_path, tally, 2) / "patch_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    crash.check(tmp_path / "store", tally, collect=False)
    assert tally.torn == 1


def test_a_store_that_was_never_begun_is_not_torn(tmp_path: Path) -> None:
    told = crash.Tally(seed=0)
    crash.check(tmp_path / "store", told, collect=True)
    (tmp_path / "store" / "tmp" / "x").mkdir(parents=True)
    crash.check(tmp_path / "store", told, collect=True)
    assert (told.torn, told.lost) == (0, set())
