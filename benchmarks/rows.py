"""Rows of the cross-lingual table: measures in percent, several seeds in one row, goals, examples."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import xpatch
from xpatch.evaluation import Estimate, Metrics, Report, pool

from .protocol import Protocol

SCALARS = (
    "reliability", "reliability_needed", "mlg", "clg_avg", "clg_needed_avg", "clg_unseen_avg", "clg_unseen_all_avg",
    "locality_train", "locality_test", "unchanged_avg", "clg_needed_any_avg", "clg_unseen_any_avg",
)  # fmt: skip
BY_LANGUAGE = (
    "before", "clg", "clg_needed", "clg_unseen", "clg_unseen_all", "clg_needed_any", "clg_unseen_any", "unchanged",
    "unchanged_train", "unchanged_test", "locality_train_by_language", "locality_test_by_language",
)  # fmt: skip
COUNTS = ("patches", "edits", "failed", "seconds", "edits_per_s", "cpu_s")


def summarise(
    rows: Sequence[dict[str, Any]], reports: Sequence[Report], published: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One row for all seeds: means, their standard deviation over seeds, and intervals bootstrapped over subjects.

    published: the row of the paper's table.
    """
    first = rows[0]
    joint = pool(reports)
    any_ = pool([_any(report) for report in reports])
    summary = {key: first.get(key) for key in ("name", "method", "preset", "label", "languages")}
    spread: dict[str, Any] = {}
    for field in (*COUNTS, *SCALARS):
        summary[field], spread[field] = _mean([row[field] for row in rows])
    for field in BY_LANGUAGE:
        pairs = {language: _mean([row[field][language] for row in rows]) for language in first[field]}
        summary[field] = {language: mean for language, (mean, _) in pairs.items()}
        spread[field] = {language: deviation for language, (_, deviation) in pairs.items()}
    return {
        **summary,
        "restored_bit_exact": all(row["restored_bit_exact"] for row in rows),
        "edit_set": reports[0].edits,
        "intervals": {**_intervals(joint), **_intervals(any_, "_any")},
        "spread": spread if len(rows) > 1 else {},
        "runs": list(rows),
        "paper": published,
    }


def values(metrics: Metrics) -> dict[str, Any]:
    """The measures in percent, without intervals; None or {} where nothing was asked."""
    return {
        **{field: _percent(getattr(metrics, field)) for field in SCALARS if not field.endswith("_any_avg")},
        **{
            field: {language: _percent(found) for language, found in getattr(metrics, field).items()}
            for field in BY_LANGUAGE
            if not field.endswith("_any")
        },
    }


def values_any(report: Report) -> dict[str, Any]:
    """The measures over the claims the unpatched model gets wrong in any language, the same edits for every method."""
    metrics = pool([_any(report)])
    return {
        "clg_needed_any": {language: _percent(found) for language, found in metrics.clg_needed.items()},
        "clg_needed_any_avg": _percent(metrics.clg_needed_avg),
        "clg_unseen_any": {language: _percent(found) for language, found in metrics.clg_unseen.items()},
        "clg_unseen_any_avg": _percent(metrics.clg_unseen_avg),
    }


def goals(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the default preset of `mpn` set out to reach, and what it reached."""
    by_name = {(row["method"], row["preset"]): row for row in rows if not row.get("label")}
    mpn = by_name.get(("mpn", "default"))
    if mpn is None:
        return []
    wanted: list[tuple[str, float, float | None]] = []
    for language, value in mpn["clg_needed"].items():
        wanted.append((f"needed edits right, {language}", 98.0, value))
    for language, value in mpn["clg_unseen"].items():
        wanted.append((f"unseen paraphrases right, {language}", 80.0 if language in ("zh", "ar") else 95.0, value))
    for language, value in mpn["unchanged"].items():
        wanted.append((f"other subjects unchanged, {language}", 97.0, value))
    wanted.append(("other subjects unchanged, mean", 98.0, mpn["unchanged_avg"]))
    rivals = [row["clg_avg"] for (method, _), row in by_name.items() if method == "t-patcher"]
    if rivals and mpn["clg_avg"] is not None:
        wanted.append(("mean CLG above the better T-Patcher row", 9.4, round(mpn["clg_avg"] - max(rivals), 2)))
    return [
        {"what": what, "at_least": least, "found": found, "met": found >= least}
        for what, least, found in wanted
        if found is not None
    ]


def choose_examples(protocol: Protocol, report: Report, count: int = 3) -> list[dict[str, Any]]:
    """Needed edits that were wrong in most languages and are right now, with the answers before and after in each."""
    answers = report.predictions["edit"]
    rows = {language: {case: i for i, case in enumerate(found.id)} for language, found in answers.items()}
    ranked = []
    for order, case in enumerate(protocol.cases):
        if case.id not in report.needed:
            continue
        marks = [
            (answers[k].gold[i], answers[k].before[i], answers[k].after[i])
            for k in case.versions
            for i in [rows[k][case.id]]
        ]
        fixed = sum(gold == after != before for gold, before, after in marks)
        ranked.append((-fixed, order, case))
    return [
        {
            "id": case.id,
            "target": case.target,
            "languages": {
                language: {
                    "text": version.text,
                    "before": report.labels[answers[language].before[rows[language][case.id]]],
                    "after": report.labels[answers[language].after[rows[language][case.id]]],
                }
                for language, version in case.versions.items()
            },
        }
        for _, _, case in sorted(ranked, key=lambda item: item[:2])[:count]
    ]


def neurons(patches: Any) -> int:
    """The paper's column "Patch Num.": patch neurons over all parts; a dense delta has none."""
    if patches is None:
        return 0
    return sum(part.keys.shape[0] for part in patches.parts.values() if isinstance(part, xpatch.PatchNeurons))


def _any(report: Report) -> Report:
    wrong = {
        case
        for found in report.predictions["edit"].values()
        for case, gold, before in zip(found.id, found.gold, found.before, strict=True)
        if gold != before
    }
    kinds = {kind: report.predictions[kind] for kind in ("edit", "rephrase") if kind in report.predictions}
    return report.model_copy(update={"needed": tuple(sorted(wrong)), "predictions": kinds})


def _percent(estimate: Estimate | None) -> float | None:
    return None if estimate is None else round(100 * estimate.value, 2)


def _mean(found: Sequence[float | None]) -> tuple[float | None, float | None]:
    numbers = [value for value in found if value is not None]
    if not numbers:
        return None, None
    return round(statistics.fmean(numbers), 2), round(statistics.stdev(numbers), 2) if len(numbers) > 1 else None


def _intervals(metrics: Metrics, suffix: str = "") -> dict[str, Any]:
    def pair(estimate: Estimate) -> list[float]:
        return [round(100 * estimate.low, 2), round(100 * estimate.high, 2)]

    names = ("clg_needed", "clg_unseen", "clg_needed_avg", "clg_unseen_avg") if suffix else (*SCALARS, *BY_LANGUAGE)
    made: dict[str, Any] = {}
    for name in names:
        found = getattr(metrics, name, None)
        label = (
            (name.removesuffix("_avg") + suffix + "_avg" if name.endswith("_avg") else name + suffix)
            if suffix
            else name
        )
        if isinstance(found, Estimate):
            made[label] = pair(found)
        elif isinstance(found, dict):
            made[label] = {language: pair(one) for language, one in found.items()}
    return made
