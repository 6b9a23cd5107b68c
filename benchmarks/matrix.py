"""XME's matrices: an edit stated in one language alone, measured by itself in every language, on bases fine-tuned in several.

Definitions (XME, section 4, and the fairer figure beside them), for edit language x and evaluation language y:

- `gs[x][y]`: share of unseen paraphrases in y that have the edit's label; the diagonal is a paraphrase too.
- `flips[x][y]`: the same over the paraphrases the base answered wrongly, so that an inert editor scores 0.
- `text[x][y]`: share of canonical wordings in y; on the diagonal the very text that was edited.
- `ss[x][y]`: share of answers in y on claims about other subjects that stay, four drawn for each edit.

All cells are over the same claims, each wrong in every language before; XME draws claims without asking whether they are wrong and
keeps the label of half of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xpatch
from xpatch import EditRequest
from xpatch.evaluation import Readings, Report, evaluate_alone

from . import cache, machine, paper, plan
from .plan import Row
from .progress import Steps, steps
from .protocol import Protocol

FIELDS = ("gs", "flips", "text", "ss")
SCRIPTS = {"zh": "Han", "ar": "Arabic"}  # every other language here is written in Latin letters


def run(
    out: str | Path | None,
    bases: Mapping[str, tuple[Any, Any, Protocol, Readings]],
    *,
    rows: Sequence[Row] = plan.MATRIX,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] | None = None,
    presets: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    work: Path | None = None,
    editors: Path | None = None,
    missing: Mapping[str, str] | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """The matrices of all rows on all bases, as JSON values, written to `out` when it is given.

    bases: name of the language(s) the base was fine-tuned in -> model, tokenizer, protocol, readings. languages: of the edits, by
    default all of the protocol. missing: bases that are not there, with the reason. Else as `crosslingual.run`.
    """
    planned = plan.chosen(rows, methods, presets)
    matrices: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = [{"base": name, "reason": reason} for name, reason in (missing or {}).items()]
    described: dict[str, Any] = {}
    cells = sum(len(languages or p.languages) for _, _, p, _ in bases.values())
    with steps(progress, cells * sum(len(row.seeds(seeds)) for row in planned)) as step:
        for base, (model, tokenizer, protocol, readings) in bases.items():
            spoken = list(languages or protocol.languages)
            described[base] = protocol.describe()
            for planned_row in planned:
                row, reason = plan.ready(planned_row, editors and _of_base(editors, base))
                runs: list[dict[str, Any]] = []
                for seed in row.seeds(seeds):
                    lines: dict[str, Any] = {}
                    for language in spoken:
                        step.begin(f"{base}: {row.key} {language} seed {seed}")
                        if reason is None:
                            try:
                                lines[language] = _line(
                                    model,
                                    tokenizer,
                                    protocol,
                                    readings,
                                    row,
                                    language,
                                    seed,
                                    base,
                                    work,
                                    step,
                                    overrides,
                                )
                            except xpatch.XpatchError as error:
                                reason = f"{type(error).__name__}: {error}"
                        step.end()
                    if reason is None:
                        runs.append({"seed": seed, **_by_field(lines)})
                if reason is not None:
                    skipped.append(
                        {"base": base, "method": row.method, "preset": row.preset, "label": row.label, "reason": reason}
                    )
                elif runs:
                    matrices.append(_matrix(base, row, runs))
    result = {
        "benchmark": "crosslingual",
        "part": "matrix",
        "schema": 1,
        "unit": "percent",
        "header": machine.header(seeds, command),
        "protocol": described,
        "overrides": overrides,
        "matrices": matrices,
        "skipped": skipped,
    }
    if out is not None:
        machine.write_json(result, Path(out))
    return result


def stated_in(request: EditRequest, language: str, alone: bool = True) -> EditRequest:
    """The request as someone who speaks `language` would write it; `alone`: without the other languages."""
    kept = {language: request.versions[language]} if alone else dict(request.versions)
    return EditRequest(id=request.id, language=language, target=request.target, versions=kept)


def cells(report: Report) -> dict[str, Any]:
    """One line of the matrices from the report of one edit language: field -> evaluation language -> percent, and `n`, the texts."""
    found: dict[str, dict[str, float | None]] = {field: {} for field in FIELDS}
    counts: dict[str, dict[str, int]] = {field: {} for field in FIELDS}

    def put(field: str, language: str, marks: Sequence[bool]) -> None:
        found[field][language] = round(100 * sum(marks) / len(marks), 2) if marks else None
        counts[field][language] = len(marks)

    for language in report.languages:
        text, rephrase = (report.predictions[kind][language] for kind in ("edit", "rephrase"))
        right = [after == gold for after, gold in zip(rephrase.after, rephrase.gold, strict=True)]
        wrong = [before != gold for before, gold in zip(rephrase.before, rephrase.gold, strict=True)]
        put("gs", language, right)
        put("flips", language, [mark for mark, was in zip(right, wrong, strict=True) if was])
        put("text", language, [after == gold for after, gold in zip(text.after, text.gold, strict=True)])
        same = [
            after == before
            for kind in ("locality_train", "locality_test")
            for answers in [report.predictions.get(kind, {}).get(language)]
            if answers is not None
            for after, before in zip(answers.after, answers.before, strict=True)
        ]
        put("ss", language, same)
    return {**found, "n": counts}


def summary(matrix: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """The means XME speaks of: the diagonal, other languages in the same script, other scripts."""
    parts: dict[str, list[float]] = {"diagonal": [], "same_script": [], "cross_script": []}
    for x, line in matrix.items():
        for y, value in line.items():
            if value is not None:
                same = SCRIPTS.get(x, "Latin") == SCRIPTS.get(y, "Latin")
                parts["diagonal" if x == y else "same_script" if same else "cross_script"].append(value)
    return {name: round(statistics.fmean(found), 2) if found else None for name, found in parts.items()}


def _line(
    model: Any,
    tokenizer: Any,
    protocol: Protocol,
    readings: Readings,
    row: Row,
    language: str,
    seed: int,
    base: str,
    work: Path | None,
    step: Steps,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """One edit language of one row and seed, kept or measured now."""
    settings = {**row.settings, **overrides}
    decided = {**settings, "matrix": language}
    key = cache.key(model, protocol, decided, row.method)[:16]
    store = work / f"matrix-{base}-{row.key}-{language}-{seed}-{key}.json.gz" if work else None
    kept = cache.load(store)
    if kept is not None:
        return kept[0]
    cases = [stated_in(case, language, alone=False) for case in protocol.cases]
    readings.before([probe for case in cases for v in case.versions.values() for probe in (v.probe, *v.rephrases)])
    begun = time.process_time()
    requests = {request.id: stated_in(request, language) for request in protocol.requests}

    def edit(chosen: Sequence[EditRequest], hear: Any) -> Any:
        return xpatch.edit(
            model,
            tokenizer,
            chosen,
            method=row.method,
            preset=row.preset or "default",
            seed=seed,
            progress=hear,
            **settings,
        )

    separable = xpatch.methods()[row.method].separable
    patches: Any = (
        edit(list(requests.values()), step.report) if separable else lambda case: edit([requests[case.id]], False)
    )
    report = evaluate_alone(
        model,
        tokenizer,
        cases,
        patches,
        locality_train=protocol.locality_train,
        locality_test=protocol.locality_test,
        readings=readings,
        seed=seed,
        progress=lambda done, total: step.report(f"alone, {language}", done, total),
    )
    line = {**cells(report), "edits": report.edits, "cpu_s": round(time.process_time() - begun, 2)}
    cache.keep(store, line, {})
    return line


def _by_field(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """edit language -> line, as field -> edit language -> evaluation language."""
    fields = {field: {x: line[field] for x, line in lines.items()} for field in FIELDS}
    counts = {field: {x: line["n"][field] for x, line in lines.items()} for field in FIELDS}
    return {
        **fields,
        "n": counts,
        "edits": {x: line["edits"] for x, line in lines.items()},
        "cpu_s": round(sum(line["cpu_s"] for line in lines.values()), 2),
    }


def _matrix(base: str, row: Row, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over seeds, and what follows from the means."""
    first = runs[0]
    made: dict[str, Any] = {
        "base": base, "name": xpatch.methods()[row.method].title, "method": row.method, "preset": row.preset, "label": row.label,
    }  # fmt: skip
    spread: dict[str, Any] = {}
    for field in FIELDS:
        made[field], spread[field] = {}, {}
        for x, line in first[field].items():
            found = {y: [run[field][x][y] for run in runs if run[field][x][y] is not None] for y in line}
            made[field][x] = {y: round(statistics.fmean(v), 2) if v else None for y, v in found.items()}
            spread[field][x] = {y: round(statistics.stdev(v), 2) if len(v) > 1 else None for y, v in found.items()}
    means = {field: summary(made[field]) for field in FIELDS}
    return {
        **made,
        "edits": first["edits"],
        "summary": means,
        "spread": spread if len(runs) > 1 else {},
        "runs": list(runs),
        "paper": paper.xme(row.method),
    }


def _of_base(editors: Path, base: str) -> Path:
    """Editors belong to a base: those of another base than the bundled one lie in a folder of its name."""
    return editors if base == "en" else editors / base
