"""Patches in production: swapping against redeploying, and whether anything tears, crashes or leaks on the way.

    xpatch bench swap --json results.json

Finished parts are kept beside the result file and reused when nothing that decides them has changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xpatch

from . import machine, parts

if TYPE_CHECKING:
    from rich.table import Table

SOAK_SWAPS, CRASH_WRITES, FUZZ_FILES = 10_000, 500, 100_000
PARTS = ("latency", "imports", "crash", "fuzz", "soak")


def run(
    out: str | Path | None = None,
    *,
    soak_swaps: int = SOAK_SWAPS,
    crash_writes: int = CRASH_WRITES,
    fuzz_files: int = FUZZ_FILES,
    patches: int = 1000,
    threads: int = 8,
    seed: int = 0,
    only: Sequence[str] = PARTS,
    latency: Mapping[str, Any] | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure and return the result as JSON values, written to `out` when it is given.

    soak_swaps, threads: of `soak.run`; crash_writes, fuzz_files: of `crash.run`, `fuzz.run`; patches: in each of the two sets that
    replace one another. only: the parts to run. latency: further arguments of `swap_latency.run`. work: folder for finished
    parts, by default beside `out`; without `out` nothing is kept. progress: a bar for each part; None: on a terminal only.
    """
    unknown = sorted(set(only).difference(PARTS))
    if unknown:
        raise xpatch.FormatError(f"swap benchmark: there is no part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    settings: dict[str, dict[str, Any]] = {
        "latency": {"patches": patches, "seed": seed, **(latency or {})},
        "imports": {},
        "crash": {"writes": crash_writes, "seed": seed},
        "fuzz": {"files": fuzz_files, "seed": seed},
        "soak": {"threads": threads, "swaps": soak_swaps, "seed": seed},
    }
    found: dict[str, dict[str, Any]] = {}
    for name in PARTS:
        if name in only:
            make, code = _maker(name, settings[name], progress)
            found[name] = parts.kept(folder, name, settings[name], make, code)
    result: dict[str, Any] = {
        "benchmark": "swap",
        "header": machine.header([seed], command),
        **found.get("latency", {}),
        **found.get("imports", {}),
        **{name: found[name] for name in ("soak", "crash", "fuzz") if name in found},
        "made": {name: part["made"] for name, part in found.items()},
    }
    result["goals"] = goals(result)
    if out is not None:
        machine.write_json(result, Path(out))
    return result


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the runtime set out to reach, and what it reached; only of the parts that were run."""
    wanted: list[tuple[str, str, float, Any]] = [
        ("a swap is so many times quicker than a reload", "at_least", 1000.0, result.get("ratio")),
        ("import xpatch over import torch", "at_most", 1.15, result.get("import_ratio")),
    ]
    for part, fields in {
        "soak": ("torn", "stale", "errors", "deadlocks"),
        "crash": ("lost", "torn"),
        "fuzz": ("crashed", "wrongly_accepted"),
    }.items():
        wanted += [(f"{part}: {field}", "at_most", 0, (result.get(part) or {}).get(field)) for field in fields]
    wanted.append(("soak: growth of the memory, %", "at_most", 2.0, (result.get("soak") or {}).get("rss_growth")))
    return [
        {"what": what, rule: bound, "found": found, "met": found >= bound if rule == "at_least" else found <= bound}
        for what, rule, bound, found in wanted
        if found is not None
    ]


def table(result: Mapping[str, Any]) -> Table:
    """The goals and the times as a rich table for the terminal."""
    from rich.table import Table

    shown = Table(title="Swapping patches")
    for head in ("", "found", "goal", "met"):
        shown.add_column(head, justify="left" if head in ("", "met") else "right")
    for what, field in (
        ("swap, ms", "swap_ms"),
        ("reload, ms", "reload_ms"),
        ("restart and first answer, ms", "restart_ms"),
    ):
        if result.get(field) is not None:
            shown.add_row(what, f"{result[field]:.3g}", "", "")
    for goal in result["goals"]:
        bound = f"≥ {goal['at_least']:g}" if "at_least" in goal else f"≤ {goal['at_most']:g}"
        shown.add_row(goal["what"], f"{goal['found']:.4g}", bound, "yes" if goal["met"] else "NO")
    return shown


def _maker(
    name: str, settings: Mapping[str, Any], progress: bool | None
) -> tuple[Callable[[], dict[str, Any]], Sequence[str]]:
    """How a part is made, and the benchmark files that decide it."""
    if name == "latency":
        from . import swap_latency

        return lambda: swap_latency.run(**settings, progress=progress), ("swap_latency", "imports", "latency")
    if name == "imports":
        from . import imports

        return lambda: imports.run(**settings, progress=progress), ("imports", "latency")
    if name == "crash":
        from . import crash

        return lambda: crash.run(**settings, progress=progress), ("crash",)
    if name == "fuzz":
        from . import fuzz

        return lambda: fuzz.run(**settings, progress=progress), ("fuzz",)
    from . import soak

    return lambda: soak.run(**settings, progress=progress), ("soak",)


def main() -> None:
    """The command line of `python -m xpatch.benchmarks.swap`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--soak-swaps", type=int, default=SOAK_SWAPS)
    parser.add_argument("--crash-writes", type=int, default=CRASH_WRITES)
    parser.add_argument("--fuzz-files", type=int, default=FUZZ_FILES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    found = parser.parse_args()
    run(
        found.json,
        soak_swaps=found.soak_swaps,
        crash_writes=found.crash_writes,
        fuzz_files=found.fuzz_files,
        seed=found.seed,
        only=found.only,
    )


if __name__ == "__main__":
    main()
