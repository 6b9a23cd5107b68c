"""What thousands of patches cost a classifier in ONNX Runtime, beside its own graph without them and beside PyTorch.

    xpatch bench latency --backend ort --model bert-base --json results/latency_ort.json

Three graphs of the same model: "full" computes every row of the last layer, "head" the one the head reads, "int8" is that one quantised. Sides are called in turn on the
same inputs, one thread of each backend as set. `swap` is the time of `Session.apply` for a set of other patches.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import xpatch

from . import goals as judged
from . import machine, parts
from .latency import measured
from .model_latency import QUICK_BUDGET_S
from .model_patches import case_for, place, read_row, watched
from .model_shapes import CALIBRATION_TEXTS, Subject, classify, grid, random_ids, subject
from .progress import steps

if TYPE_CHECKING:
    from rich.console import Group

SIDES = ("torch", "full", "head", "full_patched", "head_patched", "int8_patched")
CODE = ("ort_latency", "model_patches", "model_shapes", "latency", "trained", "texts")
ROOMS = ("exporters", "models", "ops", "patches", "runtime")
BUDGET_S = 60.0  # of timed calls a row, where 15 repeats take less: sides differ by a few percent
SWAPPED = 1000  # patches of the set that is swapped
SWAPS = 21


def run(
    out: str | Path | None = None,
    *,
    models: Sequence[str | Subject] = ("bert-base",),
    patches: int | None = None,
    batches: Sequence[int] = (),
    tokens: Sequence[int] = (),
    quick: bool = False,
    seed: int = 0,
    repeats: int | None = None,
    cases: Callable[..., Any] | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure every model and return the result as JSON values, written to `out` when it is given; arguments as in `model_latency.run`.

    Raises `XpatchError` for decoders, whose cache has no graph yet, and unknown models.
    """
    chosen = [subject(model) if isinstance(model, str) else model for model in models]
    for one in chosen:
        if one.decoder:
            raise xpatch.XpatchError(
                f"latency benchmark: {one.name} is a decoder; in ONNX Runtime classifiers are measured"
            )
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    rows: list[dict[str, Any]] = []
    shapes = grid(chosen, batches, tokens, quick)
    with steps(progress, sum(map(len, shapes.values()))) as bar:
        for one in chosen:
            count = patches or one.patches
            fixed = {
                "model": one.name, "weights": dict(one.settings or {}), "patches": count, "seed": seed,
                "build": machine.native_build(),
            }  # fmt: skip
            with tempfile.TemporaryDirectory() as place_for_graphs:
                made = functools.cache(functools.partial(_made, one, Path(place_for_graphs), count, seed, cases))
                for batch, length in shapes[one.name]:
                    bar.begin(f"{one.name} {batch} x {length}")
                    settings = {**fixed, "batch": batch, "tokens": length, "repeats": repeats, "quick": quick}
                    make = functools.partial(_row, made, batch, length, repeats, QUICK_BUDGET_S if quick else BUDGET_S)
                    found = parts.kept(folder, f"{one.name}-{batch}x{length}", settings, make, CODE, ROOMS)
                    rows.append({"model": one.name, **found})
                    bar.end()
    result: dict[str, Any] = {
        "benchmark": "latency_ort", "unit": "ms", "header": machine.header([seed], command), "rows": rows,
    }  # fmt: skip
    result["goals"] = goals(result)
    if out is not None:
        machine.write_json(result, Path(out))
    return result


@dataclass(frozen=True)
class _Made:
    """One model, its graphs, and trained patches of its width."""

    subject: Subject
    model: Any
    folders: Mapping[str, Path]
    case: Any
    seed: int


def _made(one: Subject, folder: Path, count: int, seed: int, cases: Callable[..., Any] | None) -> _Made:
    from xpatch.exporters import export_base, quantize_base

    model = one.make(seed)
    case = case_for(model.config.hidden_size, count, seed, cases)
    folders = {
        name: export_base(model, folder / name, activation=case.activation, sites=[one.site], linears=[], head_only=name == "head")
        for name in ("full", "head")
    }  # fmt: skip
    folders["int8"] = quantize_base(folders["head"], folder / "int8")
    return _Made(one, model, folders, case, seed)


@torch.no_grad()
def _row(
    make: Callable[[], _Made], batch: int, tokens: int, repeats: int | None, budget_s: float
) -> dict[str, Any]:  # fmt: skip
    from xpatch.exporters import Session

    made = make()
    ids = random_ids(made.model, CALIBRATION_TEXTS, tokens, made.seed + 2)
    read = read_row(made.model, made.subject, random_ids(made.model, 1, 8, 1))
    with watched(made.model, made.subject) as seen:
        classify(made.model, ids)(made.model)
    x, y = (rows[:, read] for rows in seen[0])
    neurons, _ = place(made.case, x, y, made.subject.site, made.seed)
    patches = xpatch.PatchSet(parts={"neurons": neurons})
    asked = random_ids(made.model, batch, tokens, made.seed + 1)
    inputs = {"input_ids": asked.numpy(), "attention_mask": torch.ones_like(asked).numpy()}
    sessions = {
        side: Session(
            made.folders[side.removesuffix("_patched")], {"fixes": patches} if side.endswith("_patched") else (),
            threads=torch.get_num_threads(),
        )
        for side in SIDES if side != "torch"
    }  # fmt: skip
    call = classify(made.model, asked)
    calls: dict[str, Callable[[], Any]] = {"torch": lambda: call(made.model)}
    for name, session in sessions.items():
        calls[name] = functools.partial(_ask, session, inputs)
    times, repeats, first = measured(calls, repeats, budget_s)
    xpatch.apply(made.model, patches, name="fixes")
    try:
        expected = call(made.model)
    finally:
        xpatch.remove(made.model)
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "batch": batch,
        "tokens": tokens,
        "patches": len(neurons.bias),
    }
    for name in SIDES:
        found[f"{name}_ms"], found[f"{name}_iqr_ms"] = times[name]["p50_ms"], times[name]["iqr_ms"]
    patched = found["head_patched_ms"]
    return {
        **found,
        "ratio_full": round(patched / found["full_ms"], 4),
        "ratio_head": round(patched / found["head_ms"], 4),
        "ratio_torch": round(patched / found["torch_ms"], 4),
        "ratio_torch_int8": round(found["int8_patched_ms"] / found["torch_ms"], 4),
        "max_logit_diff": float(f"{float((first['head_patched'] - expected).abs().max()):.4g}"),
        "moved": float(f"{float((expected - first['torch']).abs().max()):.4g}"),
        "swap_ms": _swap(sessions["head_patched"], neurons),
        "repeats": repeats,
    }


def _ask(session: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    return torch.from_numpy(session.run(inputs)["logits"])


def _swap(session: Any, neurons: xpatch.PatchNeurons) -> float:
    """Median milliseconds of `apply` for sets of `SWAPPED` patches that take each other's place."""
    sets = [
        xpatch.PatchSet(
            parts={
                "neurons": xpatch.PatchNeurons(
                    neurons.site, neurons.keys[start : start + SWAPPED], neurons.bias[start : start + SWAPPED],
                    neurons.values[start : start + SWAPPED], neurons.activation,
                )
            }
        )
        for start in (0, max(0, len(neurons.bias) - SWAPPED))
    ]  # fmt: skip
    found = []
    for turn in range(SWAPS):
        begun = time.perf_counter()
        session.apply(sets[turn % 2], "fixes")
        found.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(found), 3)


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ONNX Runtime set out to reach with patches, and what it reached at the worst point."""
    rows = [row for row in result["rows"] if row["patches"] >= 4598]
    where = ("model", "batch", "tokens")
    return [
        *judged.worst("patched over its own full graph", rows, "ratio_full", where, at_most=0.97),
        *judged.worst("patched over the graph of the read row", rows, "ratio_head", where, at_most=1.01),
        *judged.worst("patched over PyTorch, unpatched", rows, "ratio_torch", where, at_most=0.45),
        *judged.worst("ms to swap 1 000 patches", rows, "swap_ms", where, at_most=5.0),
        *judged.worst("largest difference of a logit from PyTorch", rows, "max_logit_diff", where, at_most=1e-4),
    ]


def table(result: Mapping[str, Any]) -> Group:
    """Rows and goals for the terminal; a ± is the distance between the quartiles."""
    from rich.console import Group
    from rich.table import Table

    title = f"ONNX Runtime, {result['header']['machine']['cpu']}"
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown.add_column("model")
    for head in (
        "B",
        "T",
        "patches",
        "PyTorch ms",
        "full ms",
        "head ms",
        "patched ms",
        "int8 ms",
        "of full",
        "of head",
        "of torch",
        "int8",
        "swap ms",
    ):
        shown.add_column(head, justify="right")
    for row in result["rows"]:
        times = [
            f"{row[f'{side}_ms']:.1f} ±{row[f'{side}_iqr_ms']:.1f}"
            for side in ("torch", "full", "head", "head_patched", "int8_patched")
        ]
        ratios = [f"{row[field]:.3f}" for field in ("ratio_full", "ratio_head", "ratio_torch", "ratio_torch_int8")]
        shown.add_row(
            row["model"],
            str(row["batch"]),
            str(row["tokens"]),
            f"{row['patches']:,}",
            *times,
            *ratios,
            f"{row['swap_ms']:.2f}",
        )
    return Group(shown, "", judged.table(result["goals"])) if result["goals"] else Group(shown)
