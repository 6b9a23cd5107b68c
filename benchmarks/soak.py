"""A soak of the runtime: threads that infer while two writers apply and remove patch sets, every output checked bit for bit.

    python -m xpatch.benchmarks.soak --swaps 1000

Before the threads start, every question is answered in every state by one thread. An output of the soak that equals none of
these is torn: parts of two states met in it. One that equals only states which were not published while its call ran is stale.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import xpatch

from .machine import write_json
from .progress import Steps, steps
from .soak_check import History, Judge, Table, named, table
from .soak_models import Subject, decoder, encoder

WRITERS = 2
PAUSE_S = 0.004  # mean pause of a writer between two swaps
SWITCH_S = 1e-3  # how long a thread may keep the interpreter, by default 5 ms: more meetings in the same time
LOOK_S = 0.1
_clock = time.perf_counter


def run(
    threads: int = 8,
    swaps: int = 10_000,
    seed: int = 0,
    progress: bool | None = None,
    *,
    per_swap: int = 2,
    patience_s: float = 60.0,
    subjects: Sequence[Callable[[int], Subject]] = (encoder, decoder),
) -> dict[str, Any]:
    """Infer in `threads` threads while two writers make `swaps` changes in all, shared among the models; JSON values.

    per_swap: the writers wait for so many outputs a swap, so that a quick machine compares as much as a slow one. outputs: answers that were compared; refused: calls that named a set which was not applied, and were refused as they must
    be; torn, stale, errors (calls or swaps that raised): none is right; deadlocks: threads that made no step for `patience_s`
    seconds (their stacks go to standard error and the soak ends). rss_growth: percent by which the resident memory grew between
    the end of the warm-up (a tenth of the swaps) and the end, of the worse model; None where the system does not tell. restored:
    whether after the last removal the models answer as at first and carry no hook. progress: None is a
    bar on a terminal.
    """
    if threads < 1 or swaps < WRITERS * len(subjects):
        raise xpatch.FormatError(
            f"soak: expected at least 1 thread and {WRITERS * len(subjects)} swaps (writers x models); found {threads} and {swaps}"
        )
    begun = _clock()
    parts: list[dict[str, Any]] = []
    with steps(progress, len(subjects)) as step, _one_torch_thread():
        for index, make in enumerate(subjects):
            share = swaps // len(subjects) + (index < swaps % len(subjects))
            subject = make(seed)
            step.begin(subject.name)
            parts.append(_Soak(subject, threads, share, seed, per_swap, patience_s).run(step))
            step.end()
            if parts[-1]["deadlocks"]:
                break
    growth = [part["rss_growth"] for part in parts if part["rss_growth"] is not None]
    total = {key: sum(part[key] for part in parts) for key in _COUNTED}
    return {
        "threads": threads,
        "writers": WRITERS,
        **total,
        "rss_growth": max(growth, default=None),
        "restored": all(part["restored"] for part in parts),
        "seconds": round(_clock() - begun, 1),
        "seed": seed,
        "models": parts,
    }


_COUNTED = ("swaps", "outputs", "refused", "torn", "stale", "errors", "deadlocks")


class _Soak:
    """One model's soak."""

    def __init__(self, subject: Subject, threads: int, swaps: int, seed: int, per_swap: int, patience_s: float) -> None:
        self.subject = subject
        self.threads = threads
        self.swaps = swaps
        self.seed = seed
        self.per_swap = per_swap
        self.patience_s = patience_s
        self.histories = {name: History() for name in subject.sets}
        self.expected: Table = table(subject)
        self.judge = Judge(self.expected, self.histories)
        self.done = [0] * WRITERS
        self.beats: dict[threading.Thread, float] = {}
        self.failures: list[str] = []
        self.stop = threading.Event()

    def run(self, step: Steps) -> dict[str, Any]:
        begun, hooks = _clock(), _hooks(self.subject.model)
        readers = [self._thread(self._read, index) for index in range(self.threads)]
        writers = [self._thread(self._write, index) for index in range(WRITERS)]
        samples: list[tuple[int, int]] = []  # (swaps done, bytes)
        stuck: list[threading.Thread] = []
        for thread in (*readers, *writers):
            self.beats[thread] = _clock()
            thread.start()
        while any(thread.is_alive() for thread in writers) and not stuck:
            time.sleep(LOOK_S)
            samples.append((sum(self.done), resident_bytes() or 0))
            step.report("swaps", samples[-1][0], self.swaps)
            stuck = self._stuck()
        self.stop.set()
        for thread in (*readers, *writers):
            left = self.patience_s - (_clock() - self.beats[thread])
            thread.join(max(left, LOOK_S))
        stuck = [thread for thread in (*readers, *writers) if thread.is_alive()]
        if stuck:
            _print_stacks(f"soak, {self.subject.name}: {', '.join(thread.name for thread in stuck)} made no step")
        restored = not stuck and self._restored(hooks)
        counts = self.judge.counts
        return {
            "name": self.subject.name,
            "swaps": sum(self.done),
            "outputs": counts["outputs"],
            "refused": counts["refused"],
            "torn": counts["torn"],
            "stale": counts["stale"],
            "errors": len(self.failures),
            "deadlocks": len(stuck),
            **_growth(samples, self.swaps),
            "restored": restored,
            "seconds": round(_clock() - begun, 1),
            "states": {named(state): self.judge.seen[state] for state in self.subject.states},
            "first_error": self.failures[0] if self.failures else None,
            "examples": self.judge.examples,
        }

    def _thread(self, work: Callable[[random.Random, int], None], index: int) -> threading.Thread:
        name = f"{work.__name__.strip('_')}er {index}".replace("writeer", "writer")

        def body() -> None:
            torch.set_num_threads(1)
            try:
                work(random.Random(f"{self.seed} {name}"), index)
            except BaseException as error:
                self._failed(error)

        return threading.Thread(target=body, name=name, daemon=True)  # one that hangs must not keep the process alive

    def _read(self, rng: random.Random, index: int) -> None:
        while not self.stop.is_set():
            question = rng.choice(self.subject.questions)
            begin = _clock()
            try:
                answer = question.ask()
            except Exception as error:
                self._failed(error)
            else:
                self.judge.see(question, answer, begin, _clock())
            self.beats[threading.current_thread()] = _clock()

    def _write(self, rng: random.Random, index: int) -> None:
        names = list(self.subject.sets)[index::WRITERS]  # each name has one writer, so that its history is known
        for _ in range(self.swaps // WRITERS + (index < self.swaps % WRITERS)):
            if self.stop.is_set():
                return
            name = rng.choice(names)
            history = self.histories[name]
            before = history.label
            labels = list(self.subject.sets[name])
            label = rng.choice(labels if before is None else [None, *labels])
            try:
                with history.change(label, _clock):
                    self.subject.put(name, label, before)
            except Exception as error:
                self._failed(error)
            self.done[index] += 1
            self.beats[threading.current_thread()] = _clock()
            time.sleep(2 * PAUSE_S * rng.random())
            self._await_outputs()

    def _await_outputs(self) -> None:
        while self.judge.counts["outputs"] < self.per_swap * sum(self.done) and not self.stop.is_set():
            self.beats[threading.current_thread()] = _clock()  # who waits for hanging readers does not hang
            time.sleep(0.001)

    def _failed(self, error: BaseException) -> None:
        self.failures.append(f"{threading.current_thread().name}: {type(error).__name__}: {error}")

    def _stuck(self) -> list[threading.Thread]:
        late = _clock() - self.patience_s
        return [thread for thread, beat in list(self.beats.items()) if beat < late and thread.is_alive()]

    def _restored(self, hooks: int) -> bool:
        model, nothing = self.subject.model, self.subject.states[0]
        try:
            xpatch.remove(model)
            same = all(nothing in self.expected[q.name].get(q.ask(), ()) for q in self.subject.questions)
        except Exception as error:
            self._failed(error)
            return False
        return same and _hooks(model) == hooks and not xpatch.status(model).names


def resident_bytes() -> int | None:
    """Resident memory of this process; None where neither /proc nor psutil tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        try:
            import psutil
        except ImportError:
            return None
        return int(psutil.Process().memory_info().rss)
    import resource

    return pages * resource.getpagesize()


def _growth(samples: Sequence[tuple[int, int]], swaps: int) -> dict[str, float | None]:
    """Of the sizes after the first tenth of the swaps: medians of their first and last ninth, in MiB, and the growth in percent."""
    sizes = [size for done, size in samples if 10 * done >= swaps and size]
    if len(sizes) < 2:
        return {"rss_growth": None, "rss_begin_mib": None, "rss_end_mib": None}
    few = max(1, len(sizes) // 9)
    early, late = sizes[:few], sizes[-few:]
    begin, end = statistics.median(early), statistics.median(late)
    mib = {"rss_begin_mib": round(begin / 2**20, 1), "rss_end_mib": round(end / 2**20, 1)}
    return {"rss_growth": round(100 * (end - begin) / begin, 3), **mib}


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def _print_stacks(why: str) -> None:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:  # standard error may be no real file
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        sys.stderr.write(f"{why}\n{file.read()}")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """One computing thread a call, as sums depend on how they are shared out; and short turns of the interpreter."""
    before, switch = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(switch)
        torch.set_num_threads(before)


def main() -> None:
    """The command line of `python -m xpatch.benchmarks.soak`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--swaps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    found = parser.parse_args()
    result = run(found.threads, found.swaps, found.seed)
    if found.json:
        write_json(result, found.json)
    print({key: value for key, value in result.items() if key != "models"})


if __name__ == "__main__":
    main()
