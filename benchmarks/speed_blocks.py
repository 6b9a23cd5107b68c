"""The README's tables of speed, from the results of `xpatch bench kernel` and `xpatch bench latency`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import goals
from .markdown import table


def kernel_block(result: Mapping[str, Any]) -> str:
    """How many times faster than dense PyTorch, per number of patches and rows; then the goals."""
    rows = [row for row in result["rows"] if row["dtype"] == "fp32" and row["rows"] == "read"]
    columns = sorted({row["m"] for row in rows})
    body = []
    for kind, n in dict.fromkeys((row["patches"], row["n"]) for row in rows):
        found = {row["m"]: row for row in rows if (row["patches"], row["n"]) == (kind, n)}
        fired = next(iter(found.values()))["fired_share"]
        body.append([kind, f"{n:,}", f"{100 * fired:.2g} %", *(_times(found.get(m)) for m in columns)])
    heads = ["patches", "N", "fire", *(f"M = {m}" for m in columns)]
    width, threads = rows[0]["d"], rows[0]["threads"]
    note = (
        f"`patch_ffn` against the same patches as two dense PyTorch matmuls: how many times faster. M rows a call, D = {width}, fp32, "
        f"{threads} threads; medians of interleaved calls. {_machine(result)}, ISA {result['isa']}. Patches: trained by the default and "
        "the paper preset, the default ones with outlier coordinates, and a set of which every neuron fires."
    )
    return "\n\n".join(filter(None, (table(heads, body), note, goal_table(result["goals"]))))


def stretch_note(result: Mapping[str, Any]) -> str:
    """A sentence about the largest set, and one for each goal."""
    row = max((row for row in result["rows"] if row["m"] == 1), key=lambda row: row["n"])
    text = (
        f"{row['n']:,} patches cost one row {row['kernel_ms']:.3g} ms, {row['speedup']:.3g} times less than dense PyTorch and "
        f"{row['floor_ratio']:.2g} times a plain read of their int8 keys ({row['floor_gb_s']:.3g} GB/s)."
    )
    judged = (goals.words(goal) for goal in result["goals"])
    told = (f"Goal, {what}: {bound}, {value}, {_stressed(word)}." for what, bound, value, _, word in judged)
    return " ".join((text, *told))


def latency_block(result: Mapping[str, Any]) -> str:
    """Patched models beside unpatched ones; then the goals."""
    heads = [
        *("model", "B", "T", "patches", "unpatched (ms)", "optimized (ms)", "patched (ms)"),
        *("of unpatched", "of optimized", "patches on all rows", "dense matmuls on all rows"),
    ]
    body = [
        [
            *(str(row["model"]), str(row["batch"]), str(row["tokens"]), f"{row['patches']:,}"),
            *(f"{row[f'{side}_ms']:.4g}" for side in ("unpatched", "unpatched_optimized", "patched")),
            *(f"{row[field]:.3f}" for field in ("ratio", "ratio_optimized", "ratio_full", "ratio_dense")),
        ]
        for row in result["rows"]
    ]
    diff = max((row["max_logit_diff"] for row in result["rows"] if row["dtype"] == "fp32"), default=None)
    same = "" if diff is None else f" Logits differ from those of the dense matmuls by at most {diff:.0e}."
    note = (
        "Random weights, patches trained by the default preset and placed so that as many fire as did where they were trained. *optimized*: "
        "`xpatch.optimize` alone, *patched*: with patches on top; the last four columns are ratios, the last two over unpatched. T: tokens of a "
        f"text, of a decoder's cache before its one-token step. {_machine(result)}, {result['rows'][0]['threads']} threads; medians of "
        f"interleaved calls.{same}"
    )
    return "\n\n".join(filter(None, (table(heads, body), note, goal_table(result["goals"]))))


def goal_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The goals beside what was measured, the missed ones too."""
    if not found:
        return ""
    body = [[*cells, _stressed(word)] for *cells, word in map(goals.words, found)]
    return table(["goal", "wanted", "measured, worst point", "at", ""], body)


def _stressed(word: str) -> str:
    return word if word == "met" else f"**{word}**"


def _times(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['speedup']:.1f}"


def _machine(result: Mapping[str, Any]) -> str:
    header = result["header"]
    return f"{header['machine']['cpu']}, {header['machine']['cores']} cores, torch {header['versions']['torch']}"


def editing_block(result: Mapping[str, Any]) -> str:
    """Editing on cached features beside the published procedure written plainly; then the goals."""
    heads = ["base", "procedure", "edits", "edits a second", "right (%)", "CLG mean (%)", "locality (%)"]
    body = [
        [
            row["base"],
            f"{row['procedure']}, {row['steps']} steps",
            f"{row['edits']}",
            f"{row['edits_per_s']:.3g}",
            *(f"{row[name]:.1f}" for name in ("right", "clg_avg", "locality")),
        ]
        for row in result["rows"]
    ]
    machine = result["header"]["machine"]
    note = (
        f"MPN's editing: *plain* is the published procedure with a forward of the whole model at every step, *cached* trains on the final FFN's "
        f"features one edit at a time, *chunked* many side by side. {machine['cpu']}, {machine['threads']} threads, seeds {result['header']['seeds']}."
    )
    return "\n\n".join(filter(None, (table(heads, body), note, goal_table(result["goals"]))))
