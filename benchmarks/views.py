"""The cross-lingual results as plain tables, for the README, the HTML page and the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from . import markdown


class Cell(NamedTuple):
    """A cell's text and how it stands out: "" plain, "soft" (published, left out), "strong"."""

    text: str
    style: str = ""


class View(NamedTuple):
    """One table. The first column names the row; `note` stands below."""

    title: str
    heads: Sequence[str]
    body: Sequence[Sequence[Cell]]
    note: str = ""

    def markdown(self) -> str:
        """As a Markdown table with its note."""
        marks = {"": "", "soft": "*", "strong": "**"}
        body = [
            [f"{marks[cell.style]}{cell.text}{marks[cell.style]}" if cell.text else "" for cell in row]
            for row in self.body
        ]
        made = markdown.table(self.heads, body)
        return f"{made}\n\n{self.note}" if self.note else made

    def html(self) -> str:
        """As an HTML table with its note."""
        tags = {"": "{}", "soft": "<i>{}</i>", "strong": "<b>{}</b>"}
        heads = "".join(f"<th scope=col>{escape(head)}</th>" for head in self.heads)
        lines = []
        for row in self.body:
            first, *rest = (tags[cell.style].format(escape(cell.text)) for cell in row)
            lines.append(f"<tr><th scope=row>{first}</th>{''.join(f'<td>{text}</td>' for text in rest)}</tr>")
        note = f"<p class=note>{escape(self.note)}</p>" if self.note else ""
        return f"<div class=scroll><table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{note}"

    def rich(self) -> Any:
        """As a rich table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        styles = {"": "", "soft": "dim", "strong": "bold"}
        shown = Table(title=self.title, caption=self.note or None)
        for i, head in enumerate(self.heads):
            shown.add_column(head, justify="right" if i else "left", no_wrap=not i)
        for row in self.body:
            shown.add_row(*(Text(cell.text, style=styles[cell.style]) for cell in row))
        return shown


def paper_table(rows: Sequence[Mapping[str, Any]], part: str = "table") -> View:
    """The columns of MPN's Tables 1 and 3, the published row under each method's first row."""
    languages = languages_of(rows, "clg")
    heads = ["%", "patches", "reliability", "MLG", *(f"CLG {name}" for name in languages), "CLG mean", "locality train"]
    body, seen = [], set()
    for row in rows:
        body.append([Cell(label(row)), *map(Cell, _paper_cells(row, languages))])
        if row.get("paper") and row["name"] not in seen:
            body.append([Cell("published", "soft"), *(Cell(t, "soft") for t in _paper_cells(row["paper"], languages))])
        seen.add(row["name"])
    table = {"table": "1", "all-wrong": "3"}.get(part, "1")
    title = {"all-wrong": "Claims that were wrong in every language"}.get(part, "Every method, beside the paper")
    note = (
        f"Published: MPN's Table {table}, another model (mBERT) and data set (XFEVER): compare differences, not rows."
    )
    return View(title, [*heads, "locality test"], body, note)


def user_table(rows: Sequence[Mapping[str, Any]]) -> View:
    """What a user of the patches gets, per language: needed edits right, in unseen wordings too, and what stayed."""
    fields = {
        "needed edits right": "clg_needed",
        "unseen paraphrases right": "clg_unseen",
        "other subjects unchanged": "unchanged",
    }
    languages = languages_of(rows, "unchanged")
    body = [
        [
            Cell(label(row) if title == next(iter(fields)) else ""),
            Cell(title),
            *(Cell(number(row[field].get(language))) for language in languages),
        ]
        for row in rows
        if row.get("patches") or row.get("edits")
        for title, field in fields.items()
    ]
    return View("What a user gets", ["method", "%", *languages], body)


def locality_table(rows: Sequence[Mapping[str, Any]]) -> View:
    """What other subjects' claims lose, in every language: points of accuracy, trained and unseen subjects, and answers that stay."""
    languages = languages_of(rows, "unchanged")
    before = next((row for row in rows if row["method"] == "original"), None)
    body = []
    for row in rows:
        if row["method"] == "original":
            continue
        kinds = {"train": "locality_train_by_language", "test": "locality_test_by_language"} if before else {}
        for kind, field in kinds.items():
            lost = [_difference(row[field].get(k), before[field].get(k)) for k in languages] if before else []
            body.append([Cell(label(row) if kind == "train" else ""), Cell(f"accuracy, {kind}"), *map(Cell, lost)])
        kept = [Cell(number(row["unchanged"].get(k))) for k in languages]
        body.append([Cell("" if kinds else label(row)), Cell("unchanged"), *kept])
    note = "Accuracy: percentage points against the unpatched model, on subjects its classification was trained on (train) and others."
    return View("Locality in every language", ["method", "", *languages], body, note)


def alone_table(rows: Sequence[Mapping[str, Any]]) -> View | None:
    """Methods whose edits are made independently: all edits in place together, and each by itself on the base."""
    chosen = [row for row in rows if row.get("alone")]
    if not chosen:
        return None
    languages = languages_of(chosen, "clg_needed")
    body = []
    for row in chosen:
        for how, found in (("together", row), ("alone", row["alone"])):
            body.append(
                [
                    Cell(label(row) if how == "together" else ""),
                    Cell(how),
                    *(Cell(number(found["clg_needed"].get(language))) for language in languages),
                    Cell(number(found["clg_unseen_avg"])),
                    Cell(number(found["unchanged_avg"])),
                ]
            )
    note = "Needed edits right, per language. Alone: each edit by itself on the base, as those papers measure; together: all at once."
    return View("One edit at a time", ["method", "edits", *languages, "unseen paraphrases", "unchanged"], body, note)


def zero_shot_table(rows: Sequence[Mapping[str, Any]], field: str = "clg_unseen") -> View:
    """Unseen paraphrases right per language, those of languages the patch was not trained on set apart."""
    languages = languages_of(rows, field)
    body = []
    for row in rows:
        trained = set(row.get("languages") or languages)
        cells = [Cell(number(row[field].get(k)), "" if k in trained else "strong") for k in languages]
        left = [row[field][k] for k in languages if k not in trained and row[field].get(k) is not None]
        body.append([Cell(label(row)), *cells, Cell(number(sum(left) / len(left) if left else None), "strong")])
    note = "Claims wrong in every language before. Bold: the language was left out of the patch's training."
    return View("Languages left out of training", ["trained on", *languages, "left out, mean"], body, note)


def language_model_table(result: Mapping[str, Any]) -> View:
    """Language models: edits right by greedy decoding, per language, in unseen wordings, and other answers that stay."""
    rows = [(found["base"], row) for found in result["bases"] for row in found["methods"]]
    languages = languages_of([row for _, row in rows], "clg_needed")
    body = [
        [
            Cell(f"{base}: {label(row)}"),
            Cell(f"{row['patches']:g}"),
            *(Cell(number(row["clg_needed"].get(language))) for language in languages),
            *(Cell(number(row[field])) for field in ("clg_unseen_avg", "unchanged_avg")),
            Cell(f"{row['seconds']:.0f}"),
        ]
        for base, row in rows
    ]
    heads = ["base, method", "patches", *languages, "unseen wordings", "unchanged", "seconds"]
    asked = result["protocol"]
    note = (
        f"{asked['edit_set']} facts edited at once, each with its own answer in every language; an answer is right when greedy decoding says "
        "it whole, unchanged when it says about another subject what it said before. Small bases, trained on the facts alone."
    )
    return View("Language models", heads, body, note)


def matrix_summary(matrices: Sequence[Mapping[str, Any]]) -> View:
    """XME's means: GS on the diagonal, within a script and across scripts, and SS; the published rows below each method."""
    heads = [
        "base, method",
        *(f"{a}, {b}" for a in ("flips", "GS") for b in ("diagonal", "same script", "other script")),
        "SS",
    ]
    parts = ("diagonal", "same_script", "cross_script")
    body, seen = [], set()
    for found in matrices:
        means = found["summary"]
        ss = [x for x in means["ss"].values() if x is not None]
        values = [means[field][part] for field in ("flips", "gs") for part in parts]
        body.append(
            [
                Cell(f"{found['base']}: {label(found)}"),
                *(Cell(number(v)) for v in (*values, sum(ss) / len(ss) if ss else None)),
            ]
        )
        if found["method"] not in seen:
            for model, printed in found["paper"].items():
                texts = ["", "", "", *(number(printed[part]) for part in parts), number(printed["ss"])]
                body.append([Cell(f"XME, {model}", "soft"), *(Cell(t, "soft") for t in texts)])
        seen.add(found["method"])
    note = (
        "An edit stated in one language, alone on the base; means over edit and evaluation languages. Flips: unseen paraphrases the base "
        "had wrong; GS: all of them. Bases by the language(s) of fine-tuning. XME: FEVER, edits that need not be wrong before, six other "
        "languages; an inert editor has GS 52 there."
    )
    return View("Edit language and evaluation language", heads, body, note)


def matrix_tables(matrices: Sequence[Mapping[str, Any]], field: str = "flips") -> list[View]:
    """One table a base and method: rows are edit languages, columns evaluation languages."""
    made = []
    for found in matrices:
        languages = list(found[field])
        ys = list(dict.fromkeys(y for line in found[field].values() for y in line))
        body = [
            [Cell(x), *(Cell(number(found[field][x].get(y)), "strong" if x == y else "") for y in ys)]
            for x in languages
        ]
        made.append(View(f"{found['base']}: {label(found)}", ["edited in", *ys], body))
    return made


def views(result: Mapping[str, Any]) -> list[View]:
    """The tables of one result file."""
    part = result.get("part", "table")
    if part == "matrix":
        return [matrix_summary(result["matrices"]), *matrix_tables(result["matrices"])]
    rows = result["methods"]
    if part == "zero-shot":
        return [zero_shot_table(rows), locality_table(rows)]
    alone = alone_table(rows)
    return [paper_table(rows, part), user_table(rows), *([alone] if alone else []), locality_table(rows)]


def label(row: Mapping[str, Any]) -> str:
    """A row's name: the method, its preset, and what sets it apart."""
    return ", ".join(str(row[key]) for key in ("name", "preset", "label") if row.get(key))


def languages_of(rows: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    """The languages of a field, in the order the rows have them."""
    return list(dict.fromkeys(language for row in rows for language in row.get(field) or {}))


def number(value: float | None) -> str:
    """One decimal; empty for None."""
    return "" if value is None else f"{value:.1f}"


def _difference(after: float | None, before: float | None) -> str:
    return "" if after is None or before is None else f"{after - before:+.1f}"


def _paper_cells(row: Mapping[str, Any], languages: Sequence[str]) -> list[str]:
    clg = row.get("clg") or {}
    values = [
        row.get("reliability"),
        row.get("mlg"),
        *(clg.get(language) for language in languages),
        row.get("clg_avg"),
        row.get("locality_train"),
        row.get("locality_test"),
    ]
    return [f"{row['patches']:g}", *map(number, values)]
