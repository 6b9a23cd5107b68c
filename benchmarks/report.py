"""One self-contained HTML page, and charts as SVG, from the results of the benchmarks. Nothing is loaded from elsewhere."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import activation as activation_study
from . import views
from .charts import best_rows, clg_chart, interval_of, unseen_chart, write_charts
from .machine import write_text
from .tables import path_of
from .views import languages_of

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    ("Patches", "patches"), ("Reliability", "reliability"), ("MLG", "mlg"), ("clg", ""), ("CLG mean", "clg_avg"),
    ("Locality train", "locality_train"), ("Locality test", "locality_test"), ("Unchanged", "unchanged_avg"),
    ("Needed right", "clg_needed_avg"), ("Unseen right", "clg_unseen_avg"), ("Needed edits", "edits"), ("Edits/s", "edits_per_s"),
)  # fmt: skip


def write(
    result: Mapping[str, Any],
    path: str | Path,
    activation: Mapping[str, Any] | None = None,
    further: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the page of a cross-lingual result (`run` of `crosslingual`, or the demo's JSON), with its further parts; returns the path."""
    path = Path(path)
    write_text(page(result, activation, further), path)
    return path


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of a result for the terminal: of the table part the one with every column, else the first."""
    if result.get("part", "table") == "table":
        return [table(result)]
    return [views.views(result)[0].rich()]


def table(result: Mapping[str, Any]) -> Table:
    """The rows as a rich table for the terminal, the published row under each method's last row."""
    from rich.table import Table

    languages = languages_of(result["methods"], "clg")
    shown = Table(
        title="Cross-lingual editing (%)",
        caption="published: MPN's Table 1 (mBERT, XFEVER), another model and data set",
    )
    for title, _ in COLUMNS:
        for head in ["Method"] * (title == "Patches") + (languages if title == "clg" else [title]):
            shown.add_column(head, justify="left" if head == "Method" else "right", no_wrap=head == "Method")
    rows = result["methods"]
    for i, row in enumerate(rows):
        shown.add_row(
            " ".join(filter(None, (row["name"], row.get("preset"), row.get("label")))), *_plain(row, languages)
        )
        if row.get("paper") and row["name"] not in [later["name"] for later in rows[i + 1 :]]:
            shown.add_row("  published", *_plain(row["paper"], languages), style="dim")
    return shown


def _plain(row: Mapping[str, Any], languages: Sequence[str]) -> list[str]:
    made = []
    for title, field in COLUMNS:
        found = [row["clg"].get(language) for language in languages] if title == "clg" else [row.get(field)]
        made += ["" if x is None else f"{x:g}" if field in ("patches", "edits") else f"{x:.1f}" for x in found]
    return made


def page(
    result: Mapping[str, Any],
    activation: Mapping[str, Any] | None = None,
    further: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The HTML text."""
    header = result.get("header", {})
    sections = [
        _section("Every language, every method", clg_chart(result) + unseen_chart(result), wide=True),
        _section("Beside the paper", _table(result["methods"]) + _rules(result)),
    ]
    if all("locality_train_by_language" in row for row in result["methods"]):
        more = [views.alone_table(result["methods"]), views.locality_table(result["methods"])]
        sections += [_section(view.title, view.html()) for view in more if view is not None]
    for part in further:
        first, *rest = views.views(part)
        folded = "".join(
            f"<details><summary>{escape(view.title)}</summary>{view.html()}</details>" for view in rest if view.body
        )
        sections.append(_section(first.title, first.html() + folded))
    if result.get("examples"):
        sections.append(_section("Before and after", _examples(result["examples"])))
    if activation:
        sections.append(_section("Why the default gate is ReLU", activation_study.chart(dict(activation)), wide=True))
    if result.get("latency"):
        sections.append(_section("Latency", _latency(result["latency"])))
    if result.get("goals"):
        sections.append(_section("Goals", _goals(result["goals"])))
    sections.append(_section("How this was measured", _header(header, result)))
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return template.replace("<!--sections-->", "\n".join(sections)).replace("<!--lead-->", _lead(result))


def _lead(result: Mapping[str, Any]) -> str:
    rows = {row.get("method"): row for row in best_rows(result["methods"])}
    mpn, original = rows.get("mpn"), rows.get("original")
    if mpn is None or original is None or mpn.get("clg_needed_avg") is None:
        return "Edits of the bundled claim verifier, measured in every language."
    facts = [
        (f"{mpn['edits']:g}", "claims the verifier got wrong, each edited once"),
        (f"{mpn['clg_needed_avg']:.1f} %", f"of them right afterwards, mean of {len(mpn['clg_needed'])} languages"),
    ]
    if mpn.get("clg_unseen_avg") is not None:
        facts.append((f"{mpn['clg_unseen_avg']:.1f} %", "right in wordings never trained on"))
    if mpn.get("unchanged_avg") is not None:
        facts.append((f"{mpn['unchanged_avg']:.1f} %", "of answers about other subjects unchanged"))
    return "".join(f"<div><b>{escape(number)}</b><span>{escape(text)}</span></div>" for number, text in facts)


def _section(title: str, body: str, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{escape(title)}</h2>{body}</section>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    languages = languages_of(rows, "clg")
    heads = [h for title, _ in COLUMNS for h in (languages if title == "clg" else [title])]
    body = []
    for i, row in enumerate(rows):
        apart = ", ".join(filter(None, (row.get("preset"), row.get("label"))))
        preset = f" <small>{escape(apart)}</small>" if apart else ""
        body.append(f"<tr><th scope=row>{escape(row['name'])}{preset}</th>{''.join(_cells(row, languages))}</tr>")
        if row.get("paper") and row["name"] not in [later["name"] for later in rows[i + 1 :]]:
            mark = "*" if row["paper"].get("note") else ""
            body.append(
                f"<tr class=paper><th scope=row>published{mark}</th>{''.join(_cells(row['paper'], languages))}</tr>"
            )
    notes = dict.fromkeys(row["paper"]["note"] for row in rows if row.get("paper") and row["paper"].get("note"))
    foot = f"<p class=note>* {escape('; '.join(notes))}.</p>" if notes else ""
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in ("Method", *heads))
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{foot}"


def _cells(row: Mapping[str, Any], languages: Sequence[str]) -> list[str]:
    made = []
    for title, field in COLUMNS:
        if title == "clg":
            made += [
                _cell(row.get("clg", {}).get(language), interval_of(row, "clg", language)) for language in languages
            ]
        elif field in ("patches", "edits"):
            value = row.get(field)
            made.append(f"<td>{'' if value is None else f'{value:g}'}</td>")
        else:
            made.append(_cell(row.get(field), interval_of(row, field)))
    return made


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "<td></td>"
    title = f' title="95 % interval {interval[0]:.1f} to {interval[1]:.1f}"' if interval else ""
    return f"<td{title}>{value:.1f}</td>"


def _rules(result: Mapping[str, Any]) -> str:
    rules = result.get("protocol", {}).get("rules", [])
    return (
        f"<details><summary>What each column means</summary><ul>{''.join(f'<li>{escape(rule)}</li>' for rule in rules)}</ul></details>"
        if rules
        else ""
    )


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    made = []
    for example in examples:
        lines = []
        for language, found in example["languages"].items():
            marks = [
                f'<span class="{"right" if found[when] == example["target"] else "wrong"}">{escape(found[when])}</span>'
                for when in ("before", "after")
            ]
            lines.append(
                f'<tr><th scope=row>{escape(language)}</th><td class=text lang="{escape(language)}" dir=auto>{escape(found["text"])}</td>'
                f"<td>{marks[0]}</td><td>{marks[1]}</td></tr>"
            )
        made.append(
            f"<div class=scroll><table class=claims><caption>right answer: {escape(str(example['target']))}</caption><thead><tr><th></th>"
            f"<th scope=col>Claim</th><th scope=col>Before</th><th scope=col>After</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )
    return "".join(made)


def _latency(latency: Mapping[str, Mapping[str, float]]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{found['p50_ms']:.2f}</td><td>{found['iqr_ms']:.2f}</td></tr>"
        for name, found in latency.items()
        if isinstance(found, Mapping) and "p50_ms" in found
    )
    return (
        "<div class=scroll><table><thead><tr><th></th><th scope=col>Median (ms)</th><th scope=col>Quartile distance (ms)</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _goals(goals: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(goal['what'])}</th><td>{goal['at_least']:.1f}</td><td>{goal['found']:.1f}</td>"
        f'<td><span class="{"right" if goal["met"] else "wrong"}">{"met" if goal["met"] else "not met"}</span></td></tr>'
        for goal in goals
    )
    return (
        "<div class=scroll><table><thead><tr><th></th><th scope=col>At least</th><th scope=col>Found</th><th scope=col></th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _header(header: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    found = header.get("machine", {})
    facts = {
        "Machine": ", ".join(str(x) for x in (found.get("cpu"), f"{found.get('cores')} cores", found.get("gpu")) if x)
        if found
        else None,
        "Versions": ", ".join(f"{name} {version}" for name, version in header.get("versions", {}).items()),
        "Seeds": ", ".join(str(seed) for seed in header.get("seeds", [])),
        "Edit set": f"{result['protocol']['edit_set']} claims about different subjects"
        if result.get("protocol")
        else None,
        "Command": header.get("command"),
        "Date": header.get("date"),
    }
    return f"<dl>{''.join(f'<dt>{k}</dt><dd>{escape(str(v))}</dd>' for k, v in facts.items() if v)}</dl>"


def main() -> None:
    """The command line of `python -m xpatch.benchmarks.report`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="JSON of the cross-lingual benchmark")
    parser.add_argument("--activation", type=Path, help="JSON of the activation study")
    parser.add_argument("--out", type=Path, required=True, help="the HTML page; the charts are written beside it")
    found = parser.parse_args()
    result = json.loads(found.result.read_text(encoding="utf-8"))
    study = json.loads(found.activation.read_text(encoding="utf-8")) if found.activation else None
    parts = [path_of(found.result, part) for part in ("all-wrong", "zero-shot", "matrix")]
    further = [json.loads(path.read_text(encoding="utf-8")) for path in parts if path.is_file()]
    write(result, found.out, study, further)
    write_charts(result, found.out.parent)


if __name__ == "__main__":
    main()
