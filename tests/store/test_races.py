"""Two writers at once: one wins each round, the other is told, nothing is lost; in threads, in processes, on every place."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpatch import ConflictError, PatchSet, PatchStore
from xpatch.store.sets import Sets

MakeSet = Callable[..., PatchSet]


def interrupt_upload(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """The next upload is preceded by `act`, done by somebody else."""
    real = Sets.put

    def put(self: Sets, patches: PatchSet) -> None:
        monkeypatch.setattr(Sets, "put", real)
        act()
        real(self, patches)

    monkeypatch.setattr(Sets, "put", put)


def test_the_second_of_two_writers_is_told(
    new_store: Callable[[], PatchStore], make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, base = make_set(1), make_set(2), make_set(0)
    store, other = new_store(), new_store()
    store.publish(base)
    interrupt_upload(monkeypatch, lambda: other.publish(theirs, author="bo"))
    with pytest.raises(ConflictError) as refused:
        store.publish(ours)
    for part in (
        base.fingerprint[:12],
        theirs.fingerprint[:12],
        ours.fingerprint[:12],
        "moved by bo",
        "xpatch store diff",
    ):
        assert part in str(refused.value)
    assert [move.after for move in new_store().history()] == [base.fingerprint, theirs.fingerprint]
    assert store.publish(ours).number == 3, "a second try, with open eyes, goes through"


def test_the_first_publish_of_a_store_is_a_race_too(
    new_store: Callable[[], PatchStore], make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = new_store(), new_store()
    interrupt_upload(monkeypatch, lambda: other.publish(make_set(1)))
    with pytest.raises(ConflictError, match="expected it to name nothing, found"):
        store.publish(make_set(2))
    assert len(store.history()) == 1


def test_two_writers_of_the_same_set_agree(
    new_store: Callable[[], PatchStore], make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = new_store(), new_store()
    interrupt_upload(monkeypatch, lambda: other.publish(make_set(1), author="bo"))
    assert store.publish(make_set(1), author="ann").author == "bo"
    assert len(store.history()) == 1


def test_a_rollback_loses_against_a_publish(
    new_store: Callable[[], PatchStore], make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = new_store(), new_store()
    for seed in range(2):
        store.publish(make_set(seed))
    real = Sets.get

    def get(self: Sets, *args: Any) -> PatchSet:
        monkeypatch.setattr(Sets, "get", real)
        other.publish(make_set(2))
        return real(self, *args)

    monkeypatch.setattr(Sets, "get", get)
    with pytest.raises(ConflictError):
        store.rollback()
    assert store.current().after == make_set(2).fingerprint


def race(url: str | Path, sets: list[list[PatchSet]]) -> tuple[list[int], list[str]]:
    """Each thread publishes its own sets, all threads at once, round by round. Returns the winners per round and who won."""
    rounds, winners = len(sets[0]), []
    barrier = threading.Barrier(len(sets))
    wins = [0] * rounds
    strange: list[BaseException] = []

    def writer(own: list[PatchSet]) -> None:
        store = PatchStore(url)
        for number, patches in enumerate(own):
            barrier.wait()
            head = store.current().after if number else None
            barrier.wait()
            try:
                store.publish(patches, expect=head)
                wins[number] += 1
                winners.append(patches.fingerprint)
            except ConflictError:
                pass
            except BaseException as error:
                strange.append(error)
                barrier.abort()
                return

    threads = [threading.Thread(target=writer, args=(own,)) for own in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not strange, strange
    return wins, winners


@pytest.mark.parametrize("where", ["local", "local without hard links", "memory"])
def test_threads(where: str, tmp_path: Path, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread expects what the pointer names; exactly one a round may win."""
    if where == "local without hard links":
        pytest.importorskip("fcntl")

        def no_link(*args: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("os.link", no_link)
    url = f"memory://race-{tmp_path.name}" if where == "memory" else tmp_path / "store"
    sets = [[make_set(100 * thread + number) for number in range(10)] for thread in range(3)]
    wins, winners = race(url, sets)
    assert wins == [1] * 10
    history = PatchStore(url).history()
    assert [move.after for move in history] == winners and [move.number for move in history] == list(range(1, 11))
    assert PatchStore(url).verify().ok


WRITER = """
import sys, torch
from xpatch import ConflictError, PatchNeurons, PatchSet, PatchStore
torch.set_num_threads(1)
url, mark = sys.argv[1], int(sys.argv[2])
def sets(number):
    draw = torch.Generator().manual_seed(1000 * mark + number)
    return PatchSet({"n": PatchNeurons("f", torch.randn(1, 8, generator=draw), torch.zeros(1), torch.zeros(1, 8), "relu")})
store = PatchStore(url)
print("ready", flush=True)
for line in sys.stdin:
    patches = sets(int(line))
    patches.fingerprint
    try:
        print("won", store.publish(patches).after, flush=True)
    except ConflictError:
        print("lost", patches.fingerprint, flush=True)
"""


def test_processes(tmp_path: Path, make_set: MakeSet) -> None:
    """Two processes publish at the same moment, round by round; whoever came back with success is in the history, in order."""
    url = str(tmp_path / "store")
    PatchStore(url).publish(make_set())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(mark)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for mark in (1, 2)
    ]
    try:
        assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
        conflicts, won = 0, [make_set().fingerprint]
        for number in range(15):
            for child in children:
                child.stdin.write(f"{number}\n")
                child.stdin.flush()
            answers = [child.stdout.readline().split() for child in children]
            winners = [fingerprint for word, fingerprint in answers if word == "won"]
            assert winners, "somebody always wins"
            conflicts += len(winners) == 1
            new = [move.after for move in PatchStore(url).history()][len(won) :]
            assert sorted(new) == sorted(winners), "all that won, and nothing else"
            won += new
    finally:
        for child in children:
            child.stdin.close()
            child.wait()
            child.stdout.close()
    assert conflicts, "the two never met; the test shows nothing"
    found = PatchStore(url).verify()
    assert found.ok and found.moves == len(won)
