"""Kill a publisher with kill -9, again and again, and count what the store lost.

A child process publishes distinct patch sets into a local store, one after another, and tells its parent of each publish that
came back. The parent kills it at a random moment of a publish, opens the store anew and looks: is the pointer's set whole, is
every publish that came back in the history and loadable, is everything sound that the history keeps, does `gc` remove the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from xpatch import FormatError, PatchNeurons, PatchSet, PatchStore
from xpatch.benchmarks.progress import steps

NEURONS, WIDTH = 24, 384  # 72 KiB, a set for a small encoder
MOST_BEFORE = 3  # publishes that come back before the one that is killed: 0 to so many
FIRST_GUESS_S = 0.03
BEGIN, DONE = b"b", b"d"


def patch_set(seed: int, number: int) -> PatchSet:
    """The set of one publish; no two are alike."""
    draw = torch.Generator().manual_seed(1_000_003 * seed + number)
    keys, values = torch.randn(2, NEURONS, WIDTH, generator=draw)
    neurons = PatchNeurons("bert.encoder.layer.11", keys, torch.randn(NEURONS, generator=draw), values, "relu")
    return PatchSet({"neurons.0": neurons})


@dataclass
class Tally:
    """What is known of the store from outside. acknowledged: publish number -> fingerprint, of publishes that came back."""

    seed: int
    begun: set[int] = field(default_factory=set)
    acknowledged: dict[int, str] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    torn: int = 0
    kills: int = 0
    inside: int = 0
    unacknowledged: int = 0
    removed: int = 0
    left: int = 0
    durations: list[float] = field(default_factory=list)


def run(
    writes: int = 500, seed: int = 0, folder: str | Path | None = None, progress: bool | None = None
) -> dict[str, Any]:
    """Begin `writes` publishes, killing the publisher after every few; returns the counts.

    kills; writes: publishes begun; lost: publishes that came back and are not in the history, or do not load; torn: times the
    pointer or anything the history keeps was not whole, or the store did not open; seconds. Then, to judge the above: inside: kills
    that hit an unfinished publish; unacknowledged: publishes in the history that were killed before they came back;
    leftovers_removed, leftovers_left: by `gc`, and after it; publish_p50_ms: of those that came back.

    folder: where the store is made (it must not exist yet); by default a temporary one. progress: see `steps`.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xpatch-crash-"))) / "store"
        bar = stack.enter_context(steps(progress, writes))
        bar.begin("writes")
        tally, rng, start = Tally(seed), random.Random(seed), time.perf_counter()
        while len(tally.begun) < writes:
            before = len(tally.begun)
            _life(Path(folder), tally, rng, at_most=writes - before)
            check(Path(folder), tally, collect=tally.kills % 5 == 0 or len(tally.begun) >= writes)
            for _ in range(len(tally.begun) - before):
                bar.end()
        return {
            "kills": tally.kills,
            "writes": len(tally.begun),
            "lost": len(tally.lost),
            "torn": tally.torn,
            "seconds": round(time.perf_counter() - start, 1),
            "inside": tally.inside,
            "unacknowledged": tally.unacknowledged,
            "leftovers_removed": tally.removed,
            "leftovers_left": tally.left,
            "publish_p50_ms": round(1000 * statistics.median(tally.durations), 1) if tally.durations else None,
        }


def check(folder: Path, tally: Tally, *, collect: bool) -> None:
    """Open the store as any reader would and compare it with what came back. collect: call `gc` too and see what it leaves."""
    try:
        store = PatchStore(folder)
        move = store.current()
        served = store.get()
        if (
            served.fingerprint != move.after
            or served.fingerprint != patch_set(tally.seed, int(move.message or -1)).fingerprint
        ):
            tally.torn += 1
        named = {int(each.message or -1): each.after for each in store.history()}
        found = store.verify()
    except Exception:  # whatever it is, a reader could not read
        if tally.acknowledged or not _is_empty(folder):
            tally.torn += 1
            tally.lost |= set(tally.acknowledged)
        return
    kept = [damage for damage in found.damage if damage.kept_by]
    tally.torn += len(kept)
    for number, fingerprint in tally.acknowledged.items():
        if named.get(number) != fingerprint or any(fingerprint in damage.where for damage in kept):
            tally.lost.add(number)
    tally.unacknowledged = len(named.keys() - tally.acknowledged.keys())
    if collect:
        collected = store.gc(grace=0)
        tally.removed += len(collected.removed) + len(collected.leftovers)
        after = store.verify()
        tally.left = after.leftovers + after.sets - len(set(named.values()))


def _is_empty(folder: Path) -> bool:
    """Whether the store was killed before its first publish could name anything."""
    with contextlib.suppress(FormatError):
        return not list(PatchStore(folder).list().pointers)
    return not (folder / "history").exists()


def _life(folder: Path, tally: Tally, rng: random.Random, at_most: int) -> None:
    """One publisher, from its start to its kill."""
    context = _processes()
    reader, writer = context.Pipe(duplex=False)
    first = max(tally.begun, default=-1) + 1
    child = context.Process(target=_publish, args=(str(folder), tally.seed, first, at_most, writer), daemon=True)
    child.start()
    writer.close()
    try:
        _listen(reader, tally, first + min(rng.randint(0, MOST_BEFORE), at_most - 1))
        typical = statistics.median(tally.durations) if tally.durations else FIRST_GUESS_S
        time.sleep(rng.uniform(0, typical))
        child.kill()
        tally.kills += 1
        _listen(reader, tally, None)
        tally.inside += len(tally.begun) - first > sum(number >= first for number in tally.acknowledged)
    finally:
        child.kill()
        child.join()
        reader.close()


def _listen(reader: Connection, tally: Tally, until: int | None) -> None:
    """Take in what the child says until it begins publish `until`; None: until nothing is left to hear."""
    began = 0.0
    while True:
        try:
            word, number, fingerprint = reader.recv_bytes().split(b" ")
        except (EOFError, OSError):
            return
        if word == BEGIN:
            began = time.perf_counter()
            tally.begun.add(int(number))
            if int(number) == until:
                return
        elif word == DONE:
            tally.acknowledged[int(number)] = fingerprint.decode()
            if began:
                tally.durations.append(time.perf_counter() - began)


def _publish(folder: str, seed: int, first: int, at_most: int, writer: Connection) -> None:
    """The child: publish set after set until killed."""
    torch.set_num_threads(1)
    store = PatchStore(folder)
    for number in range(first, first + at_most):
        patches = patch_set(seed, number)
        said = b"%d %s" % (number, patches.fingerprint.encode())
        writer.send_bytes(BEGIN + b" " + said)
        store.publish(patches, message=str(number))
        writer.send_bytes(DONE + b" " + said)
    for _ in itertools.count():
        time.sleep(60)


def _processes() -> Any:
    """Children forked off a server that has torch loaded and no threads; elsewhere started anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
