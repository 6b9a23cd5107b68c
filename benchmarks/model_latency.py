"""What thousands of patches cost a whole model: unpatched, with `xpatch.optimize` alone, patched, and patched by hand.

    xpatch bench latency --model bert-base --json results/latency.json

Axes: B batch, T tokens (of a text; of the cache in a decoder, whose calls are one-token steps), N patch neurons. Finished rows are
kept beside the result file and reused when nothing that decides them has changed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import xpatch

from . import goals as judged
from . import machine, parts
from .latency import measure, measured
from .model_patches import beside, case_for, fired_share, place, read_row, watched
from .model_shapes import CALIBRATION_STREAMS, CALIBRATION_TEXTS, Subject, classify, grid, random_ids, step, subject
from .progress import steps

if TYPE_CHECKING:
    from rich.console import Group

BUDGET_S, QUICK_BUDGET_S = 10.0, 3.0  # of timed calls a row, where 15 repeats take less
SIDES = ("unpatched", "unpatched_optimized", "patched", "patched_full", "dense_patched")
CODE = ("model_", "latency", "trained", "texts")


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
    """Measure every model and return the result as JSON values, written to `out` when it is given.

    models: names of `model_shapes.NAMES` or subjects; patches, batches, tokens: instead of each model's own. quick: the smaller
    batches and texts, shorter. repeats: of every side, at least 15; None: as many as the time allows. cases: the generator of
    patches, by default `xpatch.benchmarks.trained.cases`. work: folder for finished rows, by default beside `out`; without `out`
    nothing is kept. progress: a bar; None: on a terminal only. Raises `XpatchError` for an unknown model.
    """
    chosen = [subject(model) if isinstance(model, str) else model for model in models]
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    shapes = grid(chosen, batches, tokens, quick)
    rows: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    with steps(progress, sum(len(found) for found in shapes.values())) as bar:
        for one in chosen:
            count = patches or one.patches
            bench = Bench(one, count, seed, cases)
            fixed = {
                "model": one.name,
                "weights": dict(one.settings or {}),
                "dtypes": [str(dtype) for dtype in one.dtypes],
                "patches": count,
                "seed": seed,
                "build": machine.native_build(),
            }
            facts.append(parts.kept(folder, f"model-{one.name}", fixed, bench.facts, CODE))
            for batch, length in shapes[one.name]:
                bar.begin(f"{one.name} {batch} x {length}")
                settings = {**fixed, "batch": batch, "tokens": length, "repeats": repeats, "quick": quick}
                budget = QUICK_BUDGET_S if quick else BUDGET_S
                make = functools.partial(bench.row, batch, length, repeats, budget)
                found = parts.kept(folder, f"{one.name}-{batch}x{length}", settings, make, CODE)
                rows.append({"model": one.name, "backend": "torch", **found})
                bar.end()
    result: dict[str, Any] = {
        "benchmark": "latency",
        "unit": "ms",
        "header": machine.header([seed], command),
        "models": facts,
        "rows": rows,
    }
    result["goals"] = goals(result)
    if out is not None:
        machine.write_json(result, Path(out))
    return result


class Bench:
    """One model with its patches, made when the first row needs them; the sides share its weights."""

    def __init__(self, one: Subject, patches: int, seed: int, cases: Callable[..., Any] | None) -> None:
        self._subject, self._patches, self._seed, self._cases = one, patches, seed, cases
        self._placed: tuple[int, xpatch.PatchNeurons, dict[str, float]] | None = None

    @functools.cached_property
    @torch.no_grad()
    def _made(self) -> tuple[Any, dict[str, float]]:
        """The model in the quickest of its dtypes, and dtype -> ms of one small call where there are several."""
        model, found = self._subject.make(self._seed), {}
        dtypes = self._subject.dtypes
        if len(dtypes) > 1:
            for dtype in dtypes:
                call = self._bind(model.to(dtype), 1, 8)(model)
                found[_short(dtype)] = measure({"call": call}, 15, warmup=1)["call"]["p50_ms"]
        return model.to(min(dtypes, key=lambda dtype: found.get(_short(dtype), 0.0))), found

    @property
    def _model(self) -> Any:
        return self._made[0]

    @functools.cached_property
    def _case(self) -> Any:
        return case_for(self._model.config.hidden_size, self._patches, self._seed, self._cases)

    @functools.cached_property
    def _read(self) -> int:
        """The row of a text that the head reads."""
        return -1 if self._subject.decoder else read_row(self._model, self._subject, random_ids(self._model, 1, 8, 1))

    @torch.no_grad()
    def facts(self) -> dict[str, Any]:
        """What is said once a model."""
        return {
            "model": self._subject.name,
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "dtype": _short(self._model.dtype),
            "dtype_probe_ms": self._made[1],
            "site": self._subject.site,
            "patches": self._patches,
            "source": self._case.source,
            "info": dict(self._case.info),
        }

    @torch.no_grad()
    def row(self, batch: int, tokens: int, repeats: int | None, budget_s: float) -> dict[str, Any]:
        """One row of the result: every side on the same inputs, in turn."""
        neurons, shares = self._neurons(tokens)
        calls, undo = self.calls(batch, tokens)
        times, repeats, first = measured(calls, repeats, budget_s)
        logits = {name: found.float() for name, found in first.items()}
        undo()
        found: dict[str, Any] = {"dtype": _short(self._model.dtype), "threads": torch.get_num_threads()}
        found |= {"batch": batch, "tokens": tokens, "patches": self._patches}
        for name in SIDES:
            found[f"{name}_ms"] = times[name]["p50_ms"]
            found[f"{name}_iqr_ms"] = times[name]["iqr_ms"]
        patched = found["patched_ms"]
        return {
            **found,
            "ratio": round(patched / found["unpatched_ms"], 4),
            "ratio_optimized": round(patched / found["unpatched_optimized_ms"], 4),
            "ratio_full": round(found["patched_full_ms"] / found["unpatched_ms"], 4),
            "ratio_dense": round(found["dense_patched_ms"] / found["unpatched_ms"], 4),
            "max_logit_diff": _gap(logits["patched"], logits["dense_patched"]),
            "full_logit_diff": _gap(logits["patched_full"], logits["dense_patched"]),
            "moved": _gap(logits["dense_patched"], logits["unpatched"]),
            "largest_logit": float(f"{float(logits['unpatched'].abs().max()):.4g}"),
            **shares,
            **self._fired(calls["unpatched"], neurons),
            "repeats": repeats,
        }

    def _bind(self, model: Any, batch: int, tokens: int) -> Callable[[Any], Callable[[], torch.Tensor]]:
        """A side's model -> the call that is timed; `model` makes the cache of a decoder's steps."""
        ids = random_ids(model, batch, tokens + self._subject.decoder, self._seed + 1)
        if self._subject.decoder:
            return step(model, ids)
        call = classify(model, ids)
        return lambda side: functools.partial(call, side)

    @torch.no_grad()
    def calls(self, batch: int, tokens: int) -> tuple[dict[str, Callable[[], torch.Tensor]], Callable[[], None]]:
        """side -> the call that is timed, on the same weights and inputs; and what takes the hand-written patches off again."""
        neurons, bind = self._neurons(tokens)[0], self._bind(self._model, batch, tokens)
        patches = xpatch.PatchSet(parts={"neurons": neurons})
        found = {name: self._model if name == "unpatched" else _twin(self._model) for name in SIDES}
        for name in ("unpatched_optimized", "patched"):
            xpatch.optimize(found[name])
        for name in ("patched", "patched_full"):
            xpatch.apply(found[name], patches, name="fixes")
        undo = beside(found["dense_patched"], self._subject, neurons)
        return {name: bind(model) for name, model in found.items()}, undo

    def _neurons(self, tokens: int) -> tuple[xpatch.PatchNeurons, dict[str, float]]:
        """The patches for inputs of T tokens, placed by rows like those that the head reads there."""
        if self._placed is None or self._placed[0] != tokens:
            decoder = self._subject.decoder
            ids = random_ids(self._model, CALIBRATION_STREAMS if decoder else CALIBRATION_TEXTS, tokens, self._seed + 2)
            with watched(self._model, self._subject) as seen:
                classify(self._model, ids)(self._model)
            x, y = (
                rows if decoder else rows[:, self._read] for rows in seen[0]
            )  # a decoder's steps read every position
            x, y = (rows.reshape(-1, rows.shape[-1]) for rows in (x, y))
            neurons, shares = place(self._case, x, y, self._subject.site, self._seed)
            self._placed = (tokens, neurons, {"wanted_share": _digits(shares["wanted_share"])})
        return self._placed[1], self._placed[2]

    def _fired(self, call: Callable[[], Any], neurons: xpatch.PatchNeurons) -> dict[str, float]:
        """The shares of pairs that fire on the timed inputs: on the rows that are read, and on all rows of the call."""
        with watched(self._model, self._subject) as seen:
            call()
        x = seen[0][0]
        read, every = fired_share(x[:, self._read], neurons), fired_share(x.flatten(0, 1), neurons)
        return {"fired_share": _digits(read), "fired_share_tokens": _digits(every)}


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What patched models set out to reach, and what they reached at the worst point; only of the points that were measured."""
    where = ("model", "batch", "tokens")
    rows = result["rows"]
    classifiers = [row for row in rows if row["model"] in ("bert-base", "xlmr-base") and row["patches"] >= 4598]
    single = [row for row in classifiers if row["batch"] == 1]
    several = [row for row in classifiers if row["batch"] > 1]
    decoders = [row for row in rows if row["model"] in ("gpt2", "llama-1b") and row["patches"] >= 1000]
    return [
        *judged.worst("BERT-base shape, B = 1, over unpatched", single, "ratio", where, at_most=0.97),
        *judged.worst("BERT-base shape, B > 1, over unpatched", several, "ratio", where, at_most=0.94),
        *judged.worst("BERT-base shape, over unpatched with the same pruning", classifiers, "ratio_optimized", where, at_most=1.01),
        *judged.worst("decoder, one-token steps, over unpatched", decoders, "ratio", where, at_most=1.02),
    ]  # fmt: skip


def table(result: Mapping[str, Any]) -> Group:
    """Rows and goals for the terminal; a ± is the distance between the quartiles."""
    from rich.console import Group
    from rich.table import Table

    shown = Table(
        title=f"Whole models, {result['header']['machine']['cpu']}", title_justify="left", box=None, pad_edge=False
    )
    shown.add_column("model")
    heads = (
        "B",
        "T",
        "patches",
        "unpatched ms",
        "optimized ms",
        "patched ms",
        "of unp.",
        "of opt.",
        "all rows",
        "by hand",
        "logits",
    )
    for head in heads:
        shown.add_column(head, justify="right")
    for row in result["rows"]:
        times = [f"{row[f'{side}_ms']:.1f} ±{row[f'{side}_iqr_ms']:.1f}" for side in SIDES[:3]]
        ratios = [f"{row[field]:.3f}" for field in ("ratio", "ratio_optimized", "ratio_full", "ratio_dense")]
        counts = [str(row["batch"]), str(row["tokens"]), f"{row['patches']:,}"]
        shown.add_row(row["model"], *counts, *times, *ratios, f"{row['max_logit_diff']:.0e}")
    return Group(shown, "", judged.table(result["goals"])) if result["goals"] else Group(shown)


def _twin(model: Any) -> Any:
    """Another module tree on the same weights."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return _digits(float((one - other).abs().max()))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
