"""Rows of the editing benchmark: medians over seeds, what is gained over the plain procedure, goals, the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xpatch.evaluation import Report

from . import goals as judged

if TYPE_CHECKING:
    from rich.console import Group

MEANS = ("edits_per_s", "edits_per_cpu_s", "right", "reliability", "clg_avg", "clg_unseen_avg", "locality", "peak_mb")


def all_right(report: Report) -> float:
    """Edits right in every language, of all edits, percent."""
    answers = report.predictions["edit"]
    wrong: set[str] = set()
    for found in answers.values():
        wrong |= {case for case, gold, after in zip(found.id, found.gold, found.after, strict=True) if gold != after}
    cases = {case for found in answers.values() for case in found.id}
    return round(100 * (1 - len(wrong) / len(cases)), 2)


def summarise(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a base and procedure: medians over the seeds, their range in `spread`, the seeds' own rows in `runs`."""
    made = []
    for name, procedure in dict.fromkeys((run["base"], run["procedure"]) for run in found):
        runs = [run for run in found if (run["base"], run["procedure"]) == (name, procedure)]
        row = {key: value for key, value in runs[0].items() if key not in ("seed", "made")}
        for field in (*MEANS, "seconds", "cpu_seconds", "memory_seconds", "memory_cpu_seconds", "neurons"):
            values = [run[field] for run in runs if run[field] is not None]
            row[field] = round(statistics.median(values), 4) if values else None
        spread = {
            field: [min(values), max(values)]
            for field in MEANS
            if (values := [run[field] for run in runs if run[field] is not None])
        }
        made.append({**row, "seeds": [run["seed"] for run in runs], "spread": spread, "runs": list(runs)})
    return made


def speedups(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Edits a second over the plain procedure's, seed by seed; and by how much fewer edits are right at the worst seed."""
    by = {(run["base"], run["procedure"], run["seed"]): run for run in found}
    made = []
    for name, procedure in dict.fromkeys((run["base"], run["procedure"]) for run in found):
        pairs = [
            (run, by[name, "plain", run["seed"]])
            for run in found
            if (run["base"], run["procedure"]) == (name, procedure) and (name, "plain", run["seed"]) in by
        ]
        if procedure == "plain" or not pairs:
            continue
        ratios, of_cpu = (
            [float(f"{run[field] / plain[field]:.4g}") for run, plain in pairs]
            for field in ("edits_per_s", "edits_per_cpu_s")
        )
        behind = statistics.mean(plain["right"] for _, plain in pairs) - statistics.mean(
            run["right"] for run, _ in pairs
        )
        made.append(
            {
                "base": name,
                "procedure": procedure,
                "ratio": round(statistics.median(ratios), 1),
                "ratios": ratios,
                "ratio_cpu": round(statistics.median(of_cpu), 1),
                "ratios_cpu": of_cpu,
                "right_behind": round(behind, 2),
            }
        )
    return made


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the editor set out to reach against the plain procedure; only of what was measured."""
    chunked = [row for row in result["speedups"] if (row["base"], row["procedure"]) == ("bert-base", "chunked")]
    where = ("base", "procedure")
    return [
        *judged.worst("BERT-base shape: edits a second over plain", chunked, "ratio", where, at_least=50.0),
        *judged.worst("BERT-base shape: the same by processor time", chunked, "ratio_cpu", where, at_least=50.0),
        *judged.worst("BERT-base shape: edits right, points behind plain", chunked, "right_behind", where, at_most=0.0),
    ]


def table(result: Mapping[str, Any]) -> Group:
    """Rows and goals for the terminal."""
    from rich.console import Group
    from rich.table import Table

    shown = Table(
        title=f"Editing, {result['header']['machine']['cpu']}", title_justify="left", box=None, pad_edge=False
    )
    for head in ("base", "procedure"):
        shown.add_column(head)
    for head in (
        "edits",
        "steps",
        "edits/s",
        "of plain",
        "by CPU",
        "right %",
        "CLG %",
        "unseen %",
        "unchanged %",
        "peak MB",
    ):
        shown.add_column(head, justify="right")
    ratios = {
        (row["base"], row["procedure"]): (f"{row['ratio']:.1f}x", f"{row['ratio_cpu']:.1f}x")
        for row in result["speedups"]
    }
    for row in result["rows"]:
        shares = [_shown(row[field], ".1f") for field in ("right", "clg_avg", "clg_unseen_avg", "locality")]
        shown.add_row(
            row["base"], row["procedure"], f"{row['edits']:,}", str(row["steps"]), f"{row['edits_per_s']:.3g}",
            *ratios.get((row["base"], row["procedure"]), ("", "")), *shares, _shown(row["peak_mb"], ".0f"),
        )  # fmt: skip
    return Group(shown, "", judged.table(result["goals"])) if result["goals"] else Group(shown)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
