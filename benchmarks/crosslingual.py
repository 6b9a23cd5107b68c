"""Cross-lingual editing: every method on one edit set, MPN's Table 1 columns, the paper's row beside each.

    xpatch bench crosslingual --json results.json

Finished (method, preset, seed) runs are kept beside the result file and reused when nothing that decides them has changed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xpatch
from xpatch import zoo
from xpatch.evaluation import Report

from . import cache, machine
from .progress import Steps, steps
from .protocol import Protocol, bundled
from .rows import choose_examples, goals, neurons, summarise, values, values_any

METHODS = ("original", "ft", "t-patcher", "mpn-only", "mpn")
PRESETS = ("paper", "default")
SEEDS = (0, 1, 2)


def run(
    out: str | Path | None = None,
    *,
    edits: int | None = None,
    locality: int | None = None,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] = METHODS,
    presets: Sequence[str] = PRESETS,
    model: Any = None,
    tokenizer: Any = None,
    protocol: Protocol | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure all rows and return the result as JSON values, written to `out` when it is given. All shares are percent.

    edits, locality: limits for a quick look; by default everything. model, tokenizer, protocol: by default the bundled verifier
    and its claims. work: folder for finished runs, by default beside `out`; without `out` nothing is kept. overrides: settings
    of the editors. progress: as in `xpatch.edit`.
    """
    if model is None:
        model, tokenizer = zoo.load("verifier")
    asked = bundled(edits, locality) if protocol is None else protocol
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    key = cache.key(model, asked, overrides) if folder else ""
    rows, examples = [], None
    plan = _plan(methods, presets, seeds)
    with steps(progress, sum(len(row_seeds) for _, _, row_seeds in plan)) as step:
        baseline: Report | None = None
        for method, preset, row_seeds in plan:
            single, reports = [], []
            for seed in row_seeds:
                step.begin(f"{method} {preset or ''} seed {seed}")
                store = folder / f"{method}-{preset}-{seed}-{key[:16]}.json.gz" if folder else None
                found = cache.load(store)
                if found is None:
                    row, report, _ = measure(model, tokenizer, asked, method, preset, seed, baseline, step, **overrides)
                    cache.keep(store, row, report)
                else:
                    row, report = found
                baseline = baseline or report
                single.append(row)
                reports.append(report)
                step.end()
            rows.append(summarise(single, reports))
            if method == "mpn" and (examples is None or preset == "default"):
                examples = choose_examples(asked, reports[0])
    result = {
        "benchmark": "crosslingual",
        "unit": "percent",
        "header": machine.header(seeds, command),
        "model": {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())},
        "protocol": asked.describe(),
        "overrides": overrides,
        "methods": rows,
        "goals": goals(rows),
        "examples": examples or [],
    }
    if out is not None:
        machine.write_json(result, Path(out))
    return result


def measure(
    model: Any,
    tokenizer: Any,
    protocol: Protocol,
    method: str,
    preset: str | None,
    seed: int,
    baseline: Report | None = None,
    progress: bool | Callable[[str, int, int], None] | Steps | None = None,
    **overrides: Any,
) -> tuple[dict[str, Any], Report, Any]:
    """One method with one seed: `(row, report, patches)`; patches is None for "original"."""
    before = cache.digest(model)
    patches, seconds = None, 0.0
    if method != "original":
        start = time.perf_counter()
        hear = progress.report if isinstance(progress, Steps) else progress
        patches = xpatch.edit(
            model,
            tokenizer,
            protocol.requests,
            method=method,
            preset=preset or "default",
            seed=seed,
            progress=hear,
            **overrides,
        )
        seconds = time.perf_counter() - start
    report = xpatch.evaluate(
        model,
        tokenizer,
        protocol.cases,
        patches,
        locality_train=protocol.locality_train,
        locality_test=protocol.locality_test,
        locality_groups=protocol.groups,
        baseline=baseline,
    )
    tried = [record.status for record in patches or () if record.status not in ("already-right", "rejected")]
    edits = len(tried)
    info = xpatch.methods().get(method)
    row = {
        "name": info.title if info else "Original model",
        "method": method,
        "preset": preset,
        "seed": seed,
        "patches": neurons(patches),
        **values(report.metrics),
        **values_any(report),
        "edits": edits,
        "failed": sum(status in ("failed", "lost") for status in tried),
        "seconds": round(seconds, 3),
        "edits_per_s": round(edits / seconds, 2) if seconds else None,
        "restored_bit_exact": cache.digest(model) == before,
    }
    return row, report, patches


def _plan(
    methods: Sequence[str], presets: Sequence[str], seeds: Sequence[int]
) -> list[tuple[str, str | None, list[int]]]:
    known = xpatch.methods()
    plan: list[tuple[str, str | None, list[int]]] = []
    for method in methods:
        if method == "original":
            plan.append((method, None, [seeds[0]]))
        elif method in known:
            plan += [(method, preset, list(seeds)) for preset in presets if preset in known[method].presets]
        else:
            raise xpatch.FormatError(f"there is no method {method!r}; methods: {', '.join(('original', *known))}")
    return plan


def main() -> None:
    """The command line of `python -m xpatch.benchmarks.crosslingual`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--edits", type=int)
    parser.add_argument("--locality", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    found = parser.parse_args()
    run(
        found.json,
        edits=found.edits,
        locality=found.locality,
        seeds=found.seeds,
        methods=found.methods,
        presets=found.presets,
    )


if __name__ == "__main__":
    main()
