"""Goals beside what was measured: the worst point of a set of rows decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def worst(
    what: str,
    rows: Iterable[Mapping[str, Any]],
    field: str,
    where: Sequence[str],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> list[dict[str, Any]]:
    """One goal over rows, judged by the worst of them: [{"what", "at_least" or "at_most", "found", "met", "where"}].

    where: the fields that name the worst row. Empty where no row has the field: what was not measured is no goal missed or met.
    """
    known = [row for row in rows if row.get(field) is not None]
    if not known:
        return []
    if at_least is not None:
        row = min(known, key=lambda row: row[field])
        goal: dict[str, Any] = {"what": what, "at_least": at_least, "found": row[field], "met": row[field] >= at_least}
    else:
        assert at_most is not None
        row = max(known, key=lambda row: row[field])
        goal = {"what": what, "at_most": at_most, "found": row[field], "met": row[field] <= at_most}
    return [{**goal, "where": {name: row[name] for name in where}}]


def words(goal: Mapping[str, Any]) -> list[str]:
    """A goal as cells: what, the bound, what was found, where, met or missed."""
    bound = f"≥ {goal['at_least']:g}" if "at_least" in goal else f"≤ {goal['at_most']:g}"
    where = ", ".join(f"{_AXES.get(name, name)}={value}" for name, value in goal.get("where", {}).items())
    return [str(goal["what"]), bound, f"{goal['found']:.3g}", where, "met" if goal["met"] else "missed"]


def table(goals: Sequence[Mapping[str, Any]]) -> Table:
    """The goals as a rich table for the terminal."""
    from rich.table import Table

    shown = Table(title="Goals (the worst point counts)", title_justify="left")
    for head in ("", "goal", "found", "at", ""):
        shown.add_column(head, justify="right" if head in ("goal", "found") else "left")
    for goal in goals:
        shown.add_row(*words(goal), style=None if goal["met"] else "red")
    return shown


_AXES = {"n": "N", "m": "M", "batch": "B", "tokens": "T"}
