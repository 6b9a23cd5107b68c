"""Editing at scale: what thousands of edits in one call cost, and how many of them hold at the end.

    xpatch bench editing --scale --json results.json

Each count is a call of its own on the first claims of one stream (editing_claims.py), on the bundled verifier, with the default preset. The
longest call's own progress gives the curve of seconds against edits. Finished counts are kept beside the result file.
"""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import xpatch
from xpatch.zoo.verifier import data

from . import cache, editing_claims, machine, parts, rows, texts
from . import goals as judged
from .editing import CODE, ROOMS, base
from .editing_rows import all_right
from .progress import Steps, steps
from .resident import watching
from .svg import Line, Panel, curves, lines
from .trained_base import Base

if TYPE_CHECKING:
    from rich.console import Group

COUNTS = (100, 300, 1000, 3000, 10_000)
ASKED = 500  # edits whose texts and unseen paraphrases the patched model is asked, drawn once for each count
WATCHED = 200  # claims per language that must not change
CURVE = (100, 200, 500, 1000, 2000, 3000, 5000, 7000, 10_000)


def run(
    out: str | Path | None = None,
    *,
    counts: Sequence[int] = COUNTS,
    seed: int = 0,
    given: Base | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure and return the result as JSON values, written to `out` when it is given, with two charts beside it.

    given: a base of the caller's instead of the verifier. work: folder for finished counts, by default beside `out`. overrides:
    settings of the editor.
    """
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    subject = given or base("verifier")
    decides = {"base": cache.digest(subject.model) if folder else "", "seed": seed, "settings": overrides}
    with steps(progress, len(counts) + 1) as bar:
        bar.begin("choosing claims")
        found = parts.kept(
            folder, "claims", {**decides, "count": max(counts)}, lambda: _claims(subject, max(counts), seed, bar),
            ("editing_claims", "texts"), ("evaluation", "zoo"),
        )  # fmt: skip
        bar.end()
        claims = editing_claims.recall(found["claims"])
        made = []
        for count in sorted(counts):
            bar.begin(f"{count:,} edits")
            part = parts.kept(
                folder, str(count), {**decides, "count": count},
                lambda count=count: _measure(subject, claims[:count], seed, overrides, bar), CODE, ROOMS,  # type: ignore[misc]
            )  # fmt: skip
            made.append(part)
            bar.end()
    result: dict[str, Any] = {
        "benchmark": "editing_scale",
        "header": machine.header([seed], command),
        "overrides": overrides,
        "split": editing_claims.SPLIT,
        "claims": len(claims),
        "rows": made,
    }
    result["goals"] = goals(result)
    if out is not None:
        machine.write_json(result, Path(out))
        for name, text in charts(result).items():
            machine.write_text(text, Path(out).with_name(f"{Path(out).stem}{name}.svg"))
    return result


def _claims(subject: Base, count: int, seed: int, bar: Steps) -> dict[str, Any]:
    chosen = editing_claims.needed(subject.model, subject.tokenizer, count, seed, subject.languages, bar.report)
    return {"claims": [editing_claims.name(item) for item in chosen]}


def _measure(
    subject: Base, claims: Sequence[data.Claim], seed: int, overrides: Mapping[str, Any], bar: Steps
) -> dict[str, Any]:
    languages = subject.languages
    requests = editing_claims.requests(claims, languages)
    heard: dict[str, list[tuple[float, float, int]]] = {"reading": [], "training": []}
    with watching(gap=5.0) as watch:
        begun, used = time.perf_counter(), time.process_time()

        def hear(stage: str, done: int, total: int) -> None:
            heard[stage].append((time.perf_counter() - begun, time.process_time() - used, done))
            watch.note(done if stage == "training" else 0)
            bar.report(stage, done, total)

        patches = xpatch.edit(
            subject.model, subject.tokenizer, requests, method="mpn", seed=seed, memory=texts.memory(languages, 2000),
            progress=hear, **overrides,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - begun, time.process_time() - used
    status = collections.Counter(record.status for record in patches.edits)
    asked = random.Random(seed).sample(range(len(claims)), min(ASKED, len(claims)))
    cases = editing_claims.cases(claims, languages)
    report = xpatch.evaluate(
        subject.model, subject.tokenizer, [cases[index] for index in sorted(asked)], patches,
        locality_test=editing_claims.watched(WATCHED, languages),
        needed=[requests[index].id for index in sorted(asked)],
    )  # fmt: skip
    values = rows.values(report.metrics)
    read, read_cpu = heard["reading"][-1][:2] if heard["reading"] else (0.0, 0.0)
    holds = status["edited"] + status["already-right"]
    return {
        "edits": len(claims),
        "languages": list(languages),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "steps": patches.edits[0].hyperparameters["steps"],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "reading_seconds": round(read, 2),
        "reading_cpu_seconds": round(read_cpu, 2),
        "s_per_edit": float(f"{seconds / len(claims):.4g}"),
        "edits_per_s": float(f"{len(claims) / seconds:.4g}"),
        "cpu_s_per_edit": float(f"{cpu / len(claims):.4g}"),
        "train_cpu_s_per_edit": float(f"{(cpu - read_cpu) / len(claims):.4g}"),
        "status": dict(status),
        "retention": round(100 * holds / len(claims), 2),
        "asked": len(asked),
        "right_asked": all_right(report),
        "clg_unseen": values["clg_unseen"],
        "clg_unseen_avg": values["clg_unseen_avg"],
        "unchanged": values["unchanged"],
        "unchanged_avg": values["unchanged_avg"],
        "neurons": rows.neurons(patches),
        "peak_mb": watch.peak_mb,
        "curve": _curve(heard["training"], (read, read_cpu), len(claims)),
        "rss": [list(point) for point in watch.trace],
    }


def _curve(heard: Sequence[tuple[float, float, int]], read: tuple[float, float], count: int) -> list[list[float]]:
    """(edits, training seconds until so many were trained, processor seconds), at the numbers of `CURVE` and the end."""
    made = []
    for wanted in (*(number for number in CURVE if number < count), count):
        reached = heard[-1] if wanted == count else next((point for point in heard if point[2] >= wanted), None)
        if reached is not None:
            made.append([wanted, round(reached[0] - read[0], 2), round(reached[1] - read[1], 2)])
    return made


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What thousands of edits set out to keep of the smallest count's success; only where there are such."""
    found = sorted(result["rows"], key=lambda row: row["edits"])
    if len(found) < 2:
        return []
    small, large = found[0], found[-1]
    kept = [
        {"edits": large["edits"], "what": field, "share": round(100 * large[field] / small[field], 2)}
        for field in ("retention", "clg_unseen_avg", "unchanged_avg")
        if small[field]
    ]
    grown = [
        {"edits": large["edits"], "ratio": round(large["train_cpu_s_per_edit"] / small["train_cpu_s_per_edit"], 3)}
    ]
    more = large["edits"] / small["edits"]
    return [
        *judged.worst(f"{large['edits']:,} edits: % kept of what {small['edits']} reach", kept, "share", ("what",), at_least=95.0),
        *judged.worst("processor time of training an edit, times that of the fewest edits", grown, "ratio", ("edits",), at_most=more),
    ]  # fmt: skip


def charts(result: Mapping[str, Any]) -> dict[str, str]:
    """Suffix of the file name -> SVG: cost against edits."""
    found = sorted(result["rows"], key=lambda row: row["edits"])

    def line(name: str, points: Sequence[tuple[float, float]], colour: int) -> Line:
        return Line(name, [(float(x), y, y, y) for x, y in points], colour)

    cost = [
        line("whole call", [(row["edits"], 1000 * row["cpu_s_per_edit"]) for row in found], 4),
        line("training alone", [(row["edits"], 1000 * row["train_cpu_s_per_edit"]) for row in found], 2),
    ]
    share = [
        line("edits that hold", [(row["edits"], row["retention"]) for row in found], 4),
        line("unseen paraphrases right", [(row["edits"], row["clg_unseen_avg"]) for row in found], 1),
        line("other subjects unchanged", [(row["edits"], row["unchanged_avg"]) for row in found], 3),
    ]
    threads = f"{found[0]['threads']} thread{'s' * (found[0]['threads'] > 1)}"
    note = f"The bundled verifier, default preset, one call a point, {threads} of {result['header']['machine']['cpu']}."
    panels = [Panel("processor time, milliseconds an edit", cost)]
    success = [Panel("percent", share)]
    return {
        "": curves("What an edit costs, against the edits of one call", panels, "edits in one call", "ms", note),
        "_success": lines("What holds after all edits of one call (%)", success, "edits in one call", note),
    }


def table(result: Mapping[str, Any]) -> Group:
    """Rows and goals for the terminal."""
    from rich.console import Group
    from rich.table import Table

    shown = Table(
        title=f"Edits in one call, {result['header']['machine']['cpu']}", title_justify="left", box=None, pad_edge=False
    )
    for head in (
        "edits",
        "seconds",
        "edits/s",
        "CPU ms/edit trained",
        "hold %",
        "unseen %",
        "unchanged %",
        "neurons",
        "peak MB",
    ):
        shown.add_column(head, justify="right")
    for row in result["rows"]:
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        shown.add_row(
            f"{row['edits']:,}", f"{row['seconds']:.0f}", f"{row['edits_per_s']:.3g}", f"{1000 * row['train_cpu_s_per_edit']:.3g}",
            f"{row['retention']:.1f}", f"{row['clg_unseen_avg']:.1f}", f"{row['unchanged_avg']:.1f}", f"{row['neurons']:,.0f}", peak,
        )  # fmt: skip
    return Group(shown, "", judged.table(result["goals"])) if result["goals"] else Group(shown)
