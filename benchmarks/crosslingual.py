"""Cross-lingual editing: every method on one edit set, MPN's Table 1 columns, the paper's row beside each.

    xpatch bench crosslingual --json results.json

`run` makes one table from rows of the plan (`plan.py`); `tables.py` makes all of them. Finished (row, seed) runs are kept beside the
result file and reused when nothing that decides them has changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xpatch
from xpatch import zoo
from xpatch.evaluation import Readings, Report, evaluate_alone

from . import cache, machine, paper, plan
from .plan import Row
from .progress import Steps, steps
from .protocol import Protocol, bundled
from .rows import choose_examples, goals, neurons, summarise, values, values_any

SEEDS = (0, 1, 2)
SCHEMA = 2
UNTRIED = ("already-right", "rejected")


def run(
    out: str | Path | None = None,
    *,
    part: str = "table",
    rows: Sequence[Row] = plan.TABLE,
    edits: int | None = None,
    locality: int | None = None,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] | None = None,
    presets: Sequence[str] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    protocol: Protocol | None = None,
    readings: Readings | None = None,
    work: str | Path | None = None,
    editors: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure all rows and return the result as JSON values, written to `out` when it is given. All shares are percent.

    part: which table this is; "table" takes every method there is, also one the plan does not name. edits, locality: limits for a
    quick look; by default everything. methods, presets: only these rows. model, tokenizer, protocol: by default the bundled
    verifier and its claims. readings: what the model made of texts before. work: folder for finished runs, by default beside
    `out`; without `out` nothing is kept. editors: folder with a trained editor in each of its folders. overrides: settings of the
    editors. progress: as in `xpatch.edit`.

    A row that cannot be run (a method or preset that is not there, an editor nobody trained, a model it cannot edit) is listed in
    `skipped` with the reason. Raises `FormatError` for one of `methods` that does not exist.
    """
    planned = plan.chosen(rows, methods, presets, others=part == "table")
    if model is None:
        model, tokenizer = zoo.load("verifier")
    asked = bundled(edits, locality) if protocol is None else protocol
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    read = Readings(model, tokenizer) if readings is None else readings
    made: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] | None = None
    with steps(progress, sum(len(row.seeds(seeds)) for row in planned)) as step:
        for planned_row in planned:
            row, reason = plan.ready(planned_row, Path(editors) if editors else None)
            singles: list[dict[str, Any]] = []
            reports: list[dict[str, Report]] = []
            for seed in row.seeds(seeds):
                step.begin(f"{row.key} seed {seed}")
                if reason is None:
                    settings = {**row.settings, **overrides, "languages": row.languages, "alone": row.alone}
                    name = f"{part}-{row.key}-{seed}-{cache.key(model, asked, settings, row.method)[:16]}.json.gz"
                    store = folder / name if folder else None
                    try:
                        found = cache.load(store) or _kept(
                            store, measure_row(model, tokenizer, asked, row, seed, read, step, **overrides)
                        )
                    except xpatch.XpatchError as error:
                        reason = f"{type(error).__name__}: {error}"
                    else:
                        singles.append(found[0])
                        reports.append(found[1])
                step.end()
            if reason is not None:
                skipped.append({"method": row.method, "preset": row.preset, "label": row.label, "reason": reason})
                continue
            made.append(summarise(singles, [found["together"] for found in reports], paper.row(row.method, part)))
            if row.alone:
                alone = [found["alone"] for found in reports if "alone" in found]
                if alone:
                    made[-1]["alone"] = summarise([single["alone"] for single in singles], alone)
            if row.method == "mpn" and (examples is None or row.preset == "default"):
                examples = choose_examples(asked, reports[0]["together"])
    result = {
        "benchmark": "crosslingual",
        "part": part,
        "schema": SCHEMA,
        "unit": "percent",
        "header": machine.header(seeds, command),
        "model": {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())},
        "protocol": asked.describe(),
        "overrides": overrides,
        "methods": made,
        "skipped": skipped,
        "goals": goals(made) if part == "table" else [],
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
    languages: Sequence[str] | None = None,
    **overrides: Any,
) -> tuple[dict[str, Any], Report, Any]:
    """One method with one seed: `(row, report, patches)`; patches is None for "original". languages: trained on these alone."""
    row = Row(method, preset, languages=None if languages is None else tuple(languages))
    return _measure(model, tokenizer, protocol, row, seed, baseline, None, progress, overrides)


def measure_row(
    model: Any,
    tokenizer: Any,
    protocol: Protocol,
    row: Row,
    seed: int,
    readings: Readings,
    progress: Steps | None = None,
    **overrides: Any,
) -> tuple[dict[str, Any], dict[str, Report]]:
    """One row with one seed: its measures, and its reports: "together", and "alone" where the row wants it and an edit was needed."""
    # Reading comes first, so that no row's time holds it.
    readings.before([probe for probes in _probes(protocol) for probe in probes])
    begun = time.process_time()
    single, report, patches = _measure(
        model, tokenizer, protocol, row, seed, None, readings, progress, {**row.settings, **overrides}
    )
    reports = {"together": report}
    if row.alone and single["edits"]:
        reports["alone"] = evaluate_alone(
            model,
            tokenizer,
            protocol.cases,
            patches,
            locality_train=protocol.locality_train,
            locality_test=protocol.locality_test,
            readings=readings,
            seed=seed,
            progress=None if progress is None else lambda done, total: progress.report("alone", done, total),
        )
        single["alone"] = {
            **{name: single[name] for name in ("name", "method", "preset", "label", "languages", "seed")},
            **values(reports["alone"].metrics),
            **values_any(reports["alone"]),
            **dict.fromkeys(("patches", "edits", "failed", "seconds", "edits_per_s", "cpu_s")),
            "restored_bit_exact": single["restored_bit_exact"],
        }
    single["cpu_s"] = round(time.process_time() - begun, 2)
    return single, reports


def _measure(
    model: Any,
    tokenizer: Any,
    protocol: Protocol,
    row: Row,
    seed: int,
    baseline: Report | None,
    readings: Readings | None,
    progress: Any,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], Report, Any]:
    before = cache.digest(model)
    patches, seconds = None, 0.0
    if row.method != "original":
        start = time.perf_counter()
        hear = progress.report if isinstance(progress, Steps) else progress
        patches = xpatch.edit(
            model,
            tokenizer,
            protocol.requests,
            method=row.method,
            preset=row.preset or "default",
            seed=seed,
            progress=hear,
            languages=row.languages,
            **settings,
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
        readings=readings,
    )
    tried = [record.status for record in patches or () if record.status not in UNTRIED]
    info = xpatch.methods().get(row.method)
    single = {
        "name": info.title if info else "Original model",
        "method": row.method,
        "preset": row.preset,
        "label": row.label,
        "languages": list(row.languages) if row.languages else None,
        "seed": seed,
        "patches": neurons(patches),
        **values(report.metrics),
        **values_any(report),
        "edits": len(tried),
        "failed": sum(status in ("failed", "lost") for status in tried),
        "seconds": round(seconds, 3),
        "edits_per_s": round(len(tried) / seconds, 2) if seconds else None,
        "cpu_s": None,
        "restored_bit_exact": cache.digest(model) == before,
    }
    return single, report, patches


def _probes(protocol: Protocol) -> list[Sequence[Any]]:
    versions = [version for case in protocol.cases for version in case.versions.values()]
    return [
        [version.probe for version in versions],
        [probe for version in versions for probe in version.rephrases],
        *protocol.locality_train.values(),
        *protocol.locality_test.values(),
    ]


def _kept(
    store: Path | None, found: tuple[dict[str, Any], dict[str, Report]]
) -> tuple[dict[str, Any], dict[str, Report]]:
    cache.keep(store, *found)
    return found
