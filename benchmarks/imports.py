"""Start-up: how long a fresh Python takes to run a few words, several commands in turn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import xpatch

from .latency import measure
from .progress import Steps, steps

REPEATS = 15
COMMANDS = {
    "torch": "import torch",
    "xpatch": "import xpatch",
    "in_use": "import xpatch; xpatch.apply, xpatch.load, xpatch.Rows",  # names load on first use
}


def run(repeats: int = REPEATS, progress: bool | None = None) -> dict[str, Any]:
    """`import xpatch` against `import torch`, each in a fresh process, interleaved, files in the page cache; JSON values.

    import_ratio: of the medians, interpreter start included. As xpatch loads its names on first use, import_in_use_ratio is the
    same for a program that also touches `xpatch.apply`.
    """
    with steps(progress, len(COMMANDS) * (repeats + 1)) as bar:
        found = fresh(COMMANDS, repeats, bar)
    torch_ms = found["torch"]["p50_ms"]
    return {
        "import_ratio": round(found["xpatch"]["p50_ms"] / torch_ms, 4),
        "import_in_use_ratio": round(found["in_use"]["p50_ms"] / torch_ms, 4),
        "imports": {**found, "commands": COMMANDS, "repeats": repeats},
    }


def fresh(commands: Mapping[str, str], repeats: int = REPEATS, bar: Steps | None = None) -> dict[str, dict[str, float]]:
    """name -> {"p50_ms", "iqr_ms"} of `python -c COMMAND`, interleaved, after one round that warms the page cache.

    Raises `BackendError` with what a command wrote to standard error if it fails.
    """
    return measure({name: _process(command, bar) for name, command in commands.items()}, repeats, warmup=1)


def _process(command: str, bar: Steps | None) -> Callable[[], None]:
    def call() -> None:
        if bar is not None:
            bar.begin("start-up")
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise xpatch.BackendError(
                f"python -c {command!r}: expected exit code 0, found {done.returncode}: {done.stderr.strip()[-500:]}"
            )
        if bar is not None:
            bar.end()

    return call


if __name__ == "__main__":
    print(run())
