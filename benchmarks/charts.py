"""The charts of a cross-lingual result and of a kernel result, and how a row's values are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .machine import write_text
from .svg import Line, Panel, Series, curves, points
from .views import languages_of

COLOURS = {"original": 0, "ft": 1, "t-patcher": 2, "mpn-only": 3, "mpn": 4}


def write_charts(result: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write `clg.svg` and `unseen.svg`, for instance for a README."""
    made = {"clg.svg": clg_chart(result), "unseen.svg": unseen_chart(result)}
    for name, text in made.items():
        write_text(text, Path(folder) / name)
    return [Path(folder) / name for name in made]


def clg_chart(result: Mapping[str, Any]) -> str:
    """Accuracy on the edited claims after editing, per language: reliability (en) and CLG, with the paper's values as bars."""
    rows = best_rows(result["methods"])
    languages = languages_of(rows, "clg")
    series = [
        Series(
            row["name"],
            [row["reliability"], *(row["clg"].get(language) for language in languages)],
            [interval_of(row, "reliability"), *(interval_of(row, "clg", language) for language in languages)],
            [paper_of(row, "reliability"), *(paper_of(row, "clg", language) for language in languages)],
            COLOURS.get(row["method"], 0),
            row["method"] == "mpn",
        )
        for row in rows
    ]
    return points(
        "Claims of the edit set right after editing, per language (%)",
        ["en (reliability)", *languages],
        series,
        "Whole edit set, 95 % intervals. Bars: MPN's Table 1 (mBERT, XFEVER), another model and data set.",
    )


def unseen_chart(result: Mapping[str, Any]) -> str:
    """Unseen paraphrases right, per language, over the claims the unpatched model gets wrong in any language."""
    rows = best_rows(result["methods"])
    field = "clg_unseen_any" if all(row.get("clg_unseen_any") for row in rows) else "clg_unseen"
    languages = languages_of(rows, field)
    series = [
        Series(
            row["name"],
            [row[field].get(language) for language in languages],
            [interval_of(row, field, language) for language in languages],
            (),
            COLOURS.get(row["method"], 0),
            row["method"] == "mpn",
        )
        for row in rows
    ]
    which = "claims wrong in any language before" if field == "clg_unseen_any" else "each method's needed edits"
    return points(
        "What a user gets: unseen paraphrases right, per language (%)",
        languages,
        series,
        f"Paraphrases never trained on, of the {which}; 95 % intervals.",
    )


def cost_chart(result: Mapping[str, Any]) -> str:
    """The cost of a call against the number of patches: dense PyTorch, the kernel, and a plain read of the int8 keys; a panel for each M."""
    sides = (("dense PyTorch", "dense", 1), ("xpatch", "kernel", 4), ("reading the int8 keys once", "floor", 0))
    rows = sorted(result["rows"], key=lambda row: row["n"])

    def spread(row: Mapping[str, Any], side: str) -> tuple[float, float, float, float]:
        middle, half = row[f"{side}_ms"], row[f"{side}_iqr_ms"] / 2
        return float(row["n"]), middle, middle - half, middle + half

    panels = [
        Panel(
            f"{count} row{'s' * (count > 1)} a call, ms",
            [
                Line(name, [spread(row, side) for row in rows if row["m"] == count], colour)
                for name, side, colour in sides
            ],
        )
        for count in sorted({row["m"] for row in rows})
    ]
    widths = ", ".join(sorted({f"D={row['d']} {row['dtype']}, {row['threads']} threads" for row in rows}))
    note = f"Patches trained by the default preset. {widths}. Medians; bars: the distance between the quartiles."
    return curves("What patches cost, against their number", panels, "patch neurons", "ms", note)


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row a method for the charts, those of MPN's Table 1: the default preset where there is one."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row.get("label") or row.get("method") not in COLOURS:
            continue
        key = row.get("method", row["name"])
        if key not in chosen or row.get("preset") == "default":
            chosen[key] = row
    return list(chosen.values())


def interval_of(row: Mapping[str, Any], field: str, language: str | None = None) -> Sequence[float] | None:
    """A value's 95 % interval, None where there is none."""
    found = row.get("intervals", {}).get(field)
    return found.get(language) if isinstance(found, Mapping) and language else found


def paper_of(row: Mapping[str, Any], field: str, language: str | None = None) -> float | None:
    """The published value beside a row's own, None where there is none."""
    found = (row.get("paper") or {}).get(field)
    return found.get(language) if isinstance(found, Mapping) and language else found
