"""The demo's table: every editor on the same edits, MPN's Table 1 columns, the paper's row beside each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from xpatch.patches.types import PatchSet

METHODS = ("original", "ft", "t-patcher", "mpn-only", "mpn")
FIELDS = (
    "name", "patches", "reliability", "mlg", "clg", "clg_avg", "clg_needed", "clg_unseen", "locality_train", "locality_test",
    "unchanged", "edits", "edits_per_s",
)  # fmt: skip


def measure_all(
    model: Any, tokenizer: Any, protocol: Any, seed: int, tell: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], PatchSet]:
    """Train and measure every method of the table with its default preset: `(rows, examples, the patches of mpn)`.

    The rows are those of `xpatch bench crosslingual`, with intervals and the published row under `paper`.
    """
    from xpatch.benchmarks import crosslingual, paper
    from xpatch.benchmarks import rows as benchmark_rows

    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    baseline = patches = None
    for number, method in enumerate(METHODS, start=1):
        preset = None if method == "original" else "default"
        tell(f"{number}/{len(METHODS)} {method}")
        row, report, found = crosslingual.measure(model, tokenizer, protocol, method, preset, seed, baseline)
        baseline = baseline or report
        rows.append(benchmark_rows.summarise([row], [report], paper.row(method)))
        if method == "mpn":
            patches, examples = found, benchmark_rows.choose_examples(protocol, report)
    assert patches is not None
    return rows, examples, patches


def compact(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the demo's JSON holds them: the documented fields, then which method and preset it is, and the paper's row."""
    return [{key: row[key] for key in (*FIELDS, "method", "preset", "paper")} for row in rows]


def paper_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The columns of MPN's Table 1 in percent, the published row under each method; fits a terminal of 100 columns."""
    languages = list(rows[0]["clg"])
    heads = ("", "patches", "Rel", "MLG", *languages, "mean", "L train", "L test")
    table = _table("Beside the paper (%): reliability, MLG, CLG by language, locality", heads)
    for row in rows:
        table.add_row(Text(row["name"], style="bold"), *_paper_cells(row, languages))
        if row["paper"]:
            table.add_row(Text("  published"), *_paper_cells(row["paper"], languages), style="dim")
    table.caption = Text("published: MPN's Table 1, another model (mBERT) and data (XFEVER)", style="dim")
    table.caption_justify = "left"
    return table


def user_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What a user gets: for each method its needed edits right, in unseen wordings too, and other answers unchanged."""
    languages = list(rows[0]["unchanged"])
    table = _table("What a user gets (%)", ("", *languages, "edits", "edits/s"), wide=2)
    fields = {
        "needed edits right": "clg_needed",
        "unseen paraphrases right": "clg_unseen",
        "other subjects unchanged": "unchanged",
    }
    for row in rows:
        if not row["edits"]:
            continue
        for number, (title, field) in enumerate(fields.items()):
            name = Text(row["name"], style="bold") if number == 0 else Text()
            counts = (f"{row['edits']:g}", _number(row["edits_per_s"])) if number == 0 else ("", "")
            table.add_row(name, Text(title), *(_number(row[field].get(language)) for language in languages), *counts)
    return table


def _table(title: str, heads: Sequence[str], wide: int = 1) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for _ in range(wide):
        table.add_column("", no_wrap=True)
    for head in heads[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _paper_cells(row: Mapping[str, Any], languages: Sequence[str]) -> list[str]:
    values = [row["reliability"], row["mlg"], *(row["clg"].get(language) for language in languages), row["clg_avg"]]
    return [f"{row['patches']:g}", *map(_number, [*values, row["locality_train"], row["locality_test"]])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
