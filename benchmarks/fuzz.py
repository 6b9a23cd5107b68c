"""Does `xpatch.load` refuse every damaged or hostile patch folder with a `FormatError`, and nothing else?

    python -m xpatch.benchmarks.fuzz --files 100000 --seed 0 --json fuzz.json
    python -m xpatch.benchmarks.fuzz --seed 0 --only 1234 --out case/      # writes the files of one case

Valid folders of every form, written by hand, are damaged in their bytes, their JSON, their headers and their tensors; in about
half of them the fingerprint is computed anew, as an attacker would do, so that what lies behind that check is reached. Everything
happens in memory. A case depends on the seed and its index alone.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xpatch
from xpatch.errors import FormatError

from .fuzz_files import Folder, seeds
from .fuzz_mutations import mutated
from .fuzz_oracle import faults
from .machine import header, write_json
from .progress import steps

SECONDS_AT_MOST = 5.0
LISTED = 20
_STEP = 1000
_TIGHT = {
    "parts": 1,
    "edits": 2,
    "tensors": 4,
    "neurons": 3,
    "languages": 1,
    "tensor_bytes": 200,
    "config_bytes": 900,
    "width": 5,
}


class Hang(BaseException):
    """A load took longer than `SECONDS_AT_MOST`. No `Exception`, so that the code under test cannot catch it."""


def run(files: int = 100_000, seed: int = 0, progress: bool | None = None, *, first: int = 0) -> dict[str, Any]:
    """Load `files` hostile folders (cases first, first + 1, … of this seed) and count what became of them.

    files: how many. crashed: another exception than `FormatError` (also MemoryError and RecursionError) or more than 5 seconds.
    wrongly_accepted: loaded, although something that must hold of a set does not (the list is in `fuzz_oracle.faults`, which
    shares no code with the loader), or the set cannot be saved and loaded again. refused: `FormatError`. accepted_equal: loaded
    with the fingerprint of the folder the case was made from, so equal in all a fingerprint covers. accepted_valid: loaded as
    another set whose fingerprint is true and in which all holds: a set anyone may make. The five add up to `files`.
    seconds: wall time. failures: at most 20 (index, what happened), for `case(seed, index)`.

    progress: None shows a bar on a terminal, True always, False never.
    """
    folders = seeds()
    own = {name: folder.config["fingerprint"] for name, folder in folders.items()}
    counts = dict.fromkeys(("crashed", "wrongly_accepted", "refused", "accepted_equal", "accepted_valid"), 0)
    failures: list[tuple[int, str]] = []
    began = time.perf_counter()
    with steps(progress, -(-files // _STEP)) as shown:
        for index in range(first, first + files):
            if (index - first) % _STEP == 0:
                shown.begin(f"thousand files, from {index}")
            outcome, what = _outcome(folders, own, seed, index)
            counts[outcome] += 1
            if what and len(failures) < LISTED:
                failures.append((index, what))
            if (index - first + 1) % _STEP == 0 or index == first + files - 1:
                shown.end()
    return {"files": files, **counts, "seconds": time.perf_counter() - began, "failures": failures}


def case(seed: int, index: int) -> dict[str, bytes]:
    """The files of one case, by name."""
    return _case(seeds(), seed, index)[1]


def _case(folders: dict[str, Folder], seed: int, index: int) -> tuple[str, dict[str, bytes], xpatch.Limits]:
    rng = random.Random(f"{seed}:{index}")
    name, files = mutated(folders, rng)
    limits = xpatch.Limits()
    if rng.random() < 0.1:
        limit = rng.choice(list(_TIGHT))
        limits = xpatch.Limits(**{limit: _TIGHT[limit]})
    return name, files, limits


def _outcome(folders: dict[str, Folder], own: dict[str, str], seed: int, index: int) -> tuple[str, str | None]:
    name, files, limits = _case(folders, seed, index)
    began = time.perf_counter()
    try:
        with _at_most(SECONDS_AT_MOST):
            patches = xpatch.load(files, limits=limits)
    except FormatError as error:
        if time.perf_counter() - began > SECONDS_AT_MOST:
            return "crashed", f"{name}: refused after {time.perf_counter() - began:.1f} s: {error}"
        return "refused", None
    except (Exception, Hang) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "crashed",
            f"{name}: {type(error).__name__}: {str(error)[:200]} at {Path(place.filename).name}:{place.lineno}",
        )
    try:
        wrong = faults(patches, files, limits)
        if patches.fingerprint != own[name]:
            wrong += _unsavable(patches)
    except Exception as error:  # what cannot even be looked at is no set
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        return "wrongly_accepted", f"{name}: {'; '.join(wrong)[:400]}"
    return ("accepted_equal" if patches.fingerprint == own[name] else "accepted_valid"), None


def _unsavable(patches: xpatch.PatchSet) -> list[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        again = xpatch.load(xpatch.save(patches, Path(folder) / "again"))
    return [] if again.fingerprint == patches.fingerprint else ["saved and loaded it is another set"]


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `Hang` inside after so many seconds, where signals can do that; elsewhere the time is only measured afterwards."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """`python -m xpatch.benchmarks.fuzz`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--only", type=int, help="write the files of this case to --out instead of running")
    parser.add_argument("--out", type=Path)
    found = parser.parse_args()
    if found.only is not None:
        if found.out is None:
            parser.error("--only needs --out FOLDER")
        found.out.mkdir(parents=True, exist_ok=True)
        for name, data in case(found.seed, found.only).items():
            (found.out / name).write_bytes(data)
        return
    result = run(found.files, found.seed, first=found.first)
    if found.json is not None:
        write_json({**header(seeds=[found.seed]), **result}, found.json)
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
