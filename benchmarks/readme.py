"""The figures of the README and of the results page, written from the result files, so that none of them was typed.

    python -m xpatch.benchmarks.readme README.md

reads the result files in `benchmarks/results/` beside the README, and writes the block between the README's marks (the first tables, and
what patches cost) and `benchmarks/results/README.md` (what editing reaches).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xpatch import FormatError

from . import result_blocks, speed_blocks, views
from .machine import write_text
from .tables import path_of

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RESULTS = Path("benchmarks") / "results"
PAGE = "README.md"
CHARTS = {
    "clg.svg": "Claims of the edit set right after editing, per language and method",
    "unseen.svg": "Unseen paraphrases right, per language and method",
    "activation.svg": "Edits right and predictions unchanged against the number of patches, six gates",
}
# part -> its title, and how many of its tables the page shows; all are in report.html.
PARTS = {
    "table": ("One claim for each subject", 4),
    "all-wrong": ("Claims that were wrong in every language", 3),
    "zero-shot": ("Languages left out of training", 1),
    "matrix": ("Edits stated in one language", 1),
}
STRETCH = {"kernel_stretch.svg": "What patches cost, against their number"}
SCALE = {
    "editing_scale.svg": "Time an edit, against the number of edits in a call",
    "editing_scale_success.svg": "Edits that hold, unseen wordings and unchanged answers, against the number of edits in a call",
}


def rewrite(text: str, results: Path) -> str:
    """The README's text with the block between the marks made anew from the files in `results`.

    Raises `FormatError` where the marks are missing or a result file cannot be read.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise FormatError(f"the README holds no block between {BEGIN} and {END}; put the two marks back")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n{block(results)}\n{END}{tail}"


def block(results: Path) -> str:
    """The Markdown between the marks: MPN's table, what a user gets, charts, what a swap and patches cost."""
    crosslingual, demo = _read(results / "crosslingual.json"), _read(results / "demo.json")
    parts: list[str] = []
    if crosslingual is not None:
        parts += [*_tables(crosslingual["methods"]), result_blocks.origin(crosslingual)]
    elif demo is not None:
        parts += _tables(demo["methods"])
    else:
        parts.append(
            "No results are committed yet; `xpatch bench crosslingual --json benchmarks/results/crosslingual.json` makes them."
        )
    parts += _charts(results, CHARTS, RESULTS)
    parts += _made(results, {"demo.json": result_blocks.demo_note, "swap.json": result_blocks.swap_table})
    return "\n\n".join((*parts, *_speed(results)))


def page(results: Path) -> str:
    """The page beside the result files: what editing reaches, each table under its name; what patches cost stands in the README."""
    parts = [
        "# Results",
        "What editing reaches, from the files beside this page; `python -m xpatch.benchmarks.readme README.md` writes it. Every matrix, locality in "
        "every language, charts and intervals: [report.html](report.html). What patches cost: [the README](../../README.md). What each benchmark asks, and its command: [../README.md](../README.md).",
    ]
    for part, (title, shown) in PARTS.items():
        found = _read(path_of(results / "crosslingual.json", part))
        if found is not None:
            first, *rest = views.views(found)[:shown]
            parts += [f"## {title}", first.markdown(), result_blocks.origin(found)]
            parts += [f"### {view.title}\n\n{view.markdown()}" for view in rest]
    titled: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
        "language_models.json": ("Language models", lambda found: _view(views.language_model_table(found), found)),
        "hyper_editors.json": ("Trained editors", result_blocks.trained_editors),
        "editing.json": ("What an edit takes", speed_blocks.editing_block),
    }
    for name, (title, made) in titled.items():
        found = _read(results / name)
        if found is not None:
            parts.append(f"## {title}\n\n{made(found)}")
    charts = [*_charts(results, CHARTS | SCALE, Path())]
    if charts:
        parts += ["## Charts", *charts]
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """MPN's Table 1, what a user gets, and methods measured one edit at a time."""
    alone = views.alone_table(rows)
    # What was measured one edit at a time has a table of its own, which shows the edits together as well.
    default = [row for row in rows if row.get("preset") == "default" and not (row.get("label") or row.get("alone"))]
    made = [views.paper_table(rows), views.user_table(default)]
    return [view.markdown() for view in (*made, *([alone] if alone else []))]


def _view(view: views.View, result: Mapping[str, Any]) -> str:
    header = result["header"]
    made = f"Made by `{header['command']}`, {header['machine']['cpu']}. {header.get('note', '')}".rstrip()
    return f"{view.markdown()}\n\n{made}"


def _speed(results: Path) -> list[str]:
    """The kernel's and whole models' tables, each where its result file is."""
    kernel = {"kernel.json": speed_blocks.kernel_block, "kernel_stretch.json": speed_blocks.stretch_note}
    return [
        *_made(results, kernel),
        *_charts(results, STRETCH, RESULTS),
        *_made(results, {"latency.json": speed_blocks.latency_block}),
    ]


def _made(results: Path, blocks: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> list[str]:
    """Each file's block, where the file is."""
    read = {name: _read(results / name) for name in blocks}
    return [blocks[name](found) for name, found in read.items() if found is not None]


def _charts(results: Path, charts: Mapping[str, str], beside: Path) -> list[str]:
    """The charts that are there, as one paragraph."""
    found = {name: title for name, title in charts.items() if (results / name).is_file()}
    return ["\n".join(f"![{title}]({(beside / name).as_posix()})" for name, title in found.items())] if found else []


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is no readable result file: {error}; run the benchmark again") from None
    return found


def main() -> None:
    """The command line of `python -m xpatch.benchmarks.readme`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme", type=Path)
    path = parser.parse_args().readme
    results = path.parent / RESULTS
    write_text(rewrite(path.read_text(encoding="utf-8"), results), path)
    write_text(page(results), results / PAGE)


if __name__ == "__main__":
    main()
