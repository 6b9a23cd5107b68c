"""Edits of language models: what greedy decoding says afterwards, in six languages, on a decoder, a gated decoder and an encoder-decoder.

    python -m xpatch.benchmarks.language_models --presets default --json benchmarks/results/language_models.json

The bases are small and know the bundled facts (`lm_bases.py`). An edit asks for another object in every language, by its own name: six
answers of one to a few tokens. Settings were chosen on `--split validation`; `test` (the default) is other facts. An answer is right
when greedy decoding says it whole. Finished rows are kept beside the result, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xpatch

from . import bases as kept_bases
from . import cache, lm_bases, lm_facts, machine, plan
from .crosslingual import measure
from .plan import Row
from .progress import Steps, steps
from .protocol import Protocol
from .rows import summarise

SEEDS = (0, 1, 2)
METHODS: Sequence[Row] = (
    Row("ft", "paper"),
    Row("ft", "default"),
    Row("ft-l", "default"),
    Row("calinet", "default"),
    Row("t-patcher", "paper"),
    Row("t-patcher", "default"),
    Row("mpn-only", "default"),
    Row("mpn", "default"),
)


def run(
    out: str | Path | None = None,
    *,
    bases: Sequence[str] = lm_bases.KINDS,
    rows: Sequence[Row] = METHODS,
    split: str = "test",
    edits: int | None = None,
    locality: int | None = None,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] | None = None,
    presets: Sequence[str] | None = None,
    folder: str | Path | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure every row on every base; returns JSON values, written to `out` after each base when it is given.

    split: "validation" or "test". edits, locality: at most so many edits, and facts of each kind that must stay. methods, presets: only
    these rows. folder: of the bases, by default in the work folder; a missing one is trained there, in minutes. work: folder of finished
    rows, by default beside `out`. overrides: settings of all methods. Raises `FormatError` for a base, split or method there is not.
    """
    work = Path(work) if work else Path(out).with_suffix(".work") if out else None
    where = Path(folder) if folder else (work or Path("benchmarks") / "results" / "language_models.work") / "bases"
    planned, asked, memory = (
        plan.chosen(rows, methods, presets),
        lm_facts.protocol(split, edits, locality),
        lm_facts.memory(),
    )
    result: dict[str, Any] = {
        "benchmark": "language_models",
        "unit": "percent",
        "split": split,
        "header": machine.header(seeds, command),
        "protocol": asked.describe(),
        "overrides": overrides,
        "bases": [],
    }
    with steps(progress, len(bases) * sum(len(row.seeds(seeds)) for row in planned)) as step:
        for name in bases:
            model, tokenizer = kept_bases.load(lm_bases.make(where, name, tell=tell))
            made, skipped = [], []
            for row in planned:
                try:
                    made.append(_row(model, tokenizer, asked, memory, row, seeds, name, work, step, overrides))
                except xpatch.XpatchError as error:
                    skipped.append(
                        {"method": row.method, "preset": row.preset, "reason": f"{type(error).__name__}: {error}"}
                    )
            result["bases"].append(
                {
                    "base": name,
                    "class": type(model).__name__,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "methods": made,
                    "skipped": skipped,
                }
            )
            if out is not None:
                machine.write_json(result, Path(out))
    return result


def _row(
    model: Any, tokenizer: Any, asked: Protocol, memory: Mapping[str, Sequence[Any]], row: Row, seeds: Sequence[int], base: str,
    work: Path | None, step: Steps, overrides: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One row of the table: every seed, kept or measured now."""
    settings = {**row.settings, **overrides}
    singles, reports = [], []
    for seed in row.seeds(seeds):
        step.begin(f"{base}: {row.key} seed {seed}")
        try:
            key = cache.key(model, asked, {**settings, "memory": memory}, row.method)[:16]
            store = work / f"{base}-{row.key}-{seed}-{key}.json.gz" if work else None
            found = cache.load(store)
            if found is None:
                single, report, _ = measure(
                    model, tokenizer, asked, row.method, row.preset, seed, None, step, memory=memory, **settings
                )
                single["label"] = row.label
                found = single, {"together": report}
                cache.keep(store, *found)
            singles.append(found[0])
            reports.append(found[1]["together"])
        finally:
            step.end()
    return summarise(singles, reports)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `python -m xpatch.benchmarks.language_models`."""
    from .views import language_model_table

    parser = argparse.ArgumentParser(
        prog="python -m xpatch.benchmarks.language_models", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--split", choices=list(lm_facts.SPLITS), default="test")
    parser.add_argument("--bases", nargs="+", choices=lm_bases.KINDS, default=list(lm_bases.KINDS))
    parser.add_argument(
        "--folder", type=Path, help="of the bases (default: in the work folder; missing ones are made there)"
    )
    parser.add_argument("--edits", type=int)
    parser.add_argument("--locality", type=int)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--presets", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args(argv)
    found = run(
        given.json, bases=given.bases, split=given.split, edits=given.edits, locality=given.locality, seeds=given.seeds,
        methods=given.methods, presets=given.presets, folder=given.folder, tell=print,
    )  # fmt: skip
    print(language_model_table(found).markdown())


if __name__ == "__main__":
    main()
