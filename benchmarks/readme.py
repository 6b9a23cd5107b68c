"""The results block of the README, written from the result files, so that no figure in it was typed.

    python -m xpatch.benchmarks.readme README.md

reads `crosslingual.json` (and, where they are, its further parts, `hyper_editors.json`, `demo.json`, `swap.json`, `kernel.json`, `kernel_stretch.json`, `latency.json`, `editing.json` and the charts) from `benchmarks/results/` beside the README.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpatch import FormatError

from . import markdown, speed_blocks, views
from .machine import write_text
from .tables import path_of

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RESULTS = Path("benchmarks") / "results"
CHARTS = {
    "clg.svg": "Claims of the edit set right after editing, per language and method",
    "unseen.svg": "Unseen paraphrases right, per language and method",
    "activation.svg": "Edits right and predictions unchanged against the number of patches, six gates",
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
    """The Markdown between the marks: tables, charts, latency, and how they were made."""
    crosslingual, demo = _read(results / "crosslingual.json"), _read(results / "demo.json")
    parts: list[str] = []
    if crosslingual is not None:
        parts += [*_tables(crosslingual["methods"]), _origin(crosslingual)]
    elif demo is not None:
        parts += _tables(demo["methods"])
    else:
        parts.append(
            "No results are committed yet; `xpatch bench crosslingual --json benchmarks/results/crosslingual.json` makes them."
        )
    charts = {name: title for name, title in CHARTS.items() if (results / name).is_file()}
    if charts:  # one paragraph
        parts.append("\n".join(f"![{title}]({(RESULTS / name).as_posix()})" for name, title in charts.items()))
    parts += _further(results)
    trained = _read(results / "hyper_editors.json")
    if trained is not None:
        parts.append(trained_editors(trained))
    if demo is not None:
        parts.append(_demo(demo))
    swap = _read(results / "swap.json")
    if swap is not None:
        parts.append(swap_table(swap))
    return "\n\n".join((*parts, *_speed(results)))


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """MPN's Table 1, what a user gets, and methods measured one edit at a time."""
    alone = views.alone_table(rows)
    # What was measured one edit at a time has a table of its own, which shows the edits together as well.
    default = [row for row in rows if row.get("preset") == "default" and not (row.get("label") or row.get("alone"))]
    made = [views.paper_table(rows), views.user_table(default)]
    return [view.markdown() for view in (*made, *([alone] if alone else []))]


def _further(results: Path) -> list[str]:
    """The other cross-lingual tables, each where its result file is."""
    parts = []
    for part in ("all-wrong", "zero-shot", "matrix"):
        found = _read(path_of(results / "crosslingual.json", part))
        if found is None:
            continue
        if part == "matrix":
            view = views.matrix_summary(found["matrices"])
        else:
            rows = found["methods"]
            view = views.paper_table(rows, part) if part == "all-wrong" else views.zero_shot_table(rows)
        parts.append(f"**{view.title}**\n\n{view.markdown()}")
    return parts


def trained_editors(result: Mapping[str, Any]) -> str:
    """KE, MEND and LiME: each edit alone, and all in one set."""
    heads = [
        "%",
        "success",
        "CLG mean",
        "unseen paraphrases",
        "others unchanged",
        "CLG mean, all in one set",
        "others unchanged",
    ]
    body = []
    for row in result["rows"]:
        alone, flips = row["alone"], row["together"]["flips"]
        figures = [alone[name] for name in ("success", "clg_avg", "unseen_avg", "unchanged_avg")]
        figures += [flips[name].get("avg") for name in ("clg", "unchanged")]  # nothing where no edit changed the model
        shown = ("" if figure is None else f"{figure:.1f}" for figure in figures)
        body.append([row["editor"].replace(":", ", "), *shown])
    edits, machine = result["rows"][0]["alone"]["edits"], result["header"]["machine"]
    note = (
        f"Trained editors on {edits} flipped claims of the validation facts, each edit alone on the base (the papers' protocol) and all in one set: "
        f"changes made for the base alone add up, and disturb each other. Seed {result['header']['seeds'][0]}, {machine['cpu']}."
    )
    return f"{markdown.table(heads, body)}\n\n{note}"


def _speed(results: Path) -> list[str]:
    """The kernel's and whole models' tables, each where its result file is."""
    parts = []
    for name, made in (("kernel.json", speed_blocks.kernel_block), ("kernel_stretch.json", speed_blocks.stretch_note)):
        found = _read(results / name)
        if found is not None:
            parts.append(made(found))
    if (results / "kernel_stretch.svg").is_file():
        parts.append(f"![What patches cost, against their number]({(RESULTS / 'kernel_stretch.svg').as_posix()})")
    latency, editing = _read(results / "latency.json"), _read(results / "editing.json")
    if latency is not None:
        parts.append(speed_blocks.latency_block(latency))
    if editing is not None:
        parts.append(speed_blocks.editing_block(editing))
    return parts


def swap_table(result: Mapping[str, Any]) -> str:
    """Swapping against redeploying, and what the soak, the kills and the damaged files found."""
    times = {
        f"replace a live set of {result['patches']} patches": "swap_ms",
        "the same, loading the set from its folder first": "load_and_swap_ms",
        "load the model again in the same process (weights mapped, not read)": "reload_ms",
        "the same, until it has answered once": "reload_answer_ms",
        "start a new process until it has answered once": "restart_ms",
    }
    body = [
        [what, f"{result[field]:.3g}", f"{result[field] / result['swap_ms']:,.0f}"]
        for what, field in times.items()
        if result.get(field) is not None
    ]
    idle = result["idle"]
    soak, crash, fuzz = (result.get(name) for name in ("soak", "crash", "fuzz"))
    notes = [
        f"BERT-base shape, while {result['inference_threads']} threads infer (the new process: nothing else runs).",
        f"Without that load a swap takes {idle['swap_ms']:.3g} ms and the reload {idle['reload_ms']:.3g} ms, {idle['ratio']:,.0f} swaps. "
        "The goal was a reload of a thousand swaps.",
    ]
    if soak:
        grown = "" if soak["rss_growth"] is None else f", memory {soak['rss_growth']:+.1f} %"
        notes.append(
            f"{soak['threads']} threads of inference against {soak['swaps']:,} applies and removes: {soak['outputs']:,} outputs compared "
            f"bit for bit, {soak['torn']} torn, {soak['stale']} stale, {soak['deadlocks']} deadlocks{grown}."
        )
    if crash:
        notes.append(
            f"{crash['kills']:,} kills among {crash['writes']:,} writes of a store: {crash['lost']} lost, {crash['torn']} torn."
        )
    if fuzz:
        notes.append(
            f"{fuzz['files']:,} hostile patch folders: {fuzz['crashed']} crashes, {fuzz['wrongly_accepted']} wrongly accepted."
        )
    if result.get("import_ratio") is not None:
        notes.append(
            f"`import xpatch` takes {result['import_ratio']:.2f} of `import torch`; with `xpatch.apply`, {result['import_in_use_ratio']:.2f}."
        )
    table = markdown.table(["a fix goes live", "median (ms)", "of a swap"], body)
    return f"{table}\n\n{' '.join(notes)}"


def _origin(result: Mapping[str, Any]) -> str:
    header, protocol = result.get("header", {}), result.get("protocol", {})
    machine = header.get("machine", {})
    where = ", ".join(
        str(fact) for fact in (machine.get("cpu"), f"{machine.get('cores')} cores", machine.get("gpu")) if fact
    )
    versions = ", ".join(
        f"{name} {header['versions'][name]}" for name in ("torch", "transformers") if name in header.get("versions", {})
    )
    locality = min(protocol.get("locality_test", {}).values(), default=0)
    return (
        f"{protocol.get('edit_set')} claims about different subjects, {locality} locality claims of each kind and language, seeds "
        f"{', '.join(map(str, header.get('seeds', [])))}; {where}; {versions}. Made by `{header.get('command')}`; intervals "
        f"and every seed's row are in `benchmarks/results/`. {header.get('note', '')}".rstrip()
    )


def _demo(demo: Mapping[str, Any]) -> str:
    latency = "; ".join(
        f"{name}: {found['p50_ms']:.2f} ({found['iqr_ms']:.2f})" for name, found in demo["latency"].items()
    )
    restored = "bit for bit" if demo["restored_bit_exact"] else "NOT bit for bit"
    onnx = (
        ""
        if demo.get("onnx_max_diff") is None
        else f" ONNX Runtime's logits differ from PyTorch's by at most {demo['onnx_max_diff']:.0e}."
    )
    return (
        f"From the demo, one claim a call, medians in ms (between the quartiles): {latency}. Removing the patches restored weights and "
        f"answers {restored}.{onnx}"
    )


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
    write_text(rewrite(path.read_text(encoding="utf-8"), path.parent / RESULTS), path)


if __name__ == "__main__":
    main()
