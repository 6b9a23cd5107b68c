"""The neuron's activation: edits right and predictions unchanged against the number of patches, GELU and ReLU.

    python -m xpatch.benchmarks.activation --json results.json

Everything but the activation is the default preset of `mpn`. A silent GELU neuron still adds GELU(-3) times its value; hundreds
of them add up. A silent ReLU neuron adds nothing.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xpatch
from xpatch import zoo
from xpatch.evaluation import Estimate, Report, pool

from . import machine
from .progress import steps
from .protocol import Protocol, bundled
from .rows import neurons
from .svg import Line, Panel, lines

COUNTS = (10, 30, 100, 300, None)  # None: every needed edit
ACTIVATIONS = ("gelu", "relu")
MEASURES = {
    "edited": ("clg_needed_avg", "Edits right (%)"),
    "unseen": ("clg_unseen_avg", "Unseen paraphrases right (%)"),
    "unchanged": ("unchanged_avg", "Other subjects unchanged (%)"),
}


def run(
    out: str | Path | None = None,
    *,
    counts: Sequence[int | None] = COUNTS,
    activations: Sequence[str] = ACTIVATIONS,
    seeds: Sequence[int] = (0,),
    edits: int | None = None,
    locality: int | None = None,
    model: Any = None,
    tokenizer: Any = None,
    protocol: Protocol | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Train the first 10, 30, ... needed edits (in a seeded order) with each activation and measure; returns JSON values.

    With `out` the JSON is written there and the chart beside it as SVG. The arguments are those of the cross-lingual benchmark.
    """
    if model is None:
        model, tokenizer = zoo.load("verifier")
    asked = bundled(edits, locality) if protocol is None else protocol
    baseline = _evaluate(model, tokenizer, asked, None, None, None)
    sizes = sorted({min(count or len(baseline.needed), len(baseline.needed)) for count in counts} - {0})
    points = []
    with steps(progress, len(sizes) * len(activations) * len(seeds)) as step:
        for size in sizes:
            for activation in activations:
                reports, found = [], 0
                for seed in seeds:
                    step.begin(f"{activation}, {size} edits, seed {seed}")
                    chosen = set(_order(baseline.needed, seed)[:size])
                    requests = [request for request in asked.requests if request.id in chosen]
                    patches = xpatch.edit(
                        model, tokenizer, requests, method="mpn", seed=seed, progress=step.report,
                        **{**overrides, "activation": activation},
                    )  # fmt: skip
                    reports.append(_evaluate(model, tokenizer, asked, patches, chosen, baseline))
                    found += neurons(patches)
                    step.end()
                metrics = pool(reports)
                points.append(
                    {
                        "activation": activation,
                        "edits": size,
                        "patches": round(found / len(seeds), 1),
                        **{name: _numbers(getattr(metrics, field)) for name, (field, _) in MEASURES.items()},
                    }
                )
    result = {
        "benchmark": "activation",
        "unit": "percent",
        "header": machine.header(seeds, command),
        "protocol": asked.describe(),
        "overrides": overrides,
        "points": points,
    }
    if out is not None:
        path = Path(out)
        machine.write_json(result, path)
        machine.write_text(chart(result), path.with_suffix(".svg"))
    return result


def chart(result: dict[str, Any]) -> str:
    """The result as one SVG: a panel a measure, a curve an activation."""
    activations = list(dict.fromkeys(point["activation"] for point in result["points"]))
    panels = [
        Panel(
            title.removesuffix(" (%)"),
            [
                Line(
                    {"gelu": "GELU, as the FFN", "relu": "ReLU"}.get(activation, activation),
                    [
                        (point["edits"], *point[name])
                        for point in result["points"]
                        if point["activation"] == activation and point[name]
                    ],
                    colour={"gelu": 1, "relu": 4}.get(activation, i),
                )
                for i, activation in enumerate(activations)
            ],
        )
        for name, (_, title) in MEASURES.items()
    ]
    return lines(
        "MPN (all) with a GELU and with a ReLU gate, against the number of edits",
        panels,
        "edits in place",
        "%, with 95 % bootstrap intervals (cut at the scale)",
    )


def _evaluate(
    model: Any, tokenizer: Any, asked: Protocol, patches: Any, needed: set[str] | None, baseline: Report | None
) -> Report:
    return xpatch.evaluate(
        model, tokenizer, asked.cases, patches, locality_train=asked.locality_train, locality_test=asked.locality_test,
        locality_groups=asked.groups, needed=needed, baseline=baseline,
    )  # fmt: skip


def _order(ids: Sequence[str], seed: int) -> list[str]:
    return random.Random(seed).sample(list(ids), len(ids))


def _numbers(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [round(100 * x, 2) for x in (estimate.value, estimate.low, estimate.high)]


def main() -> None:
    """The command line of `python -m xpatch.benchmarks.activation`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--edits", type=int)
    parser.add_argument("--locality", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    found = parser.parse_args()
    overrides = {} if found.steps is None else {"steps": found.steps}
    run(found.json, edits=found.edits, locality=found.locality, seeds=found.seeds, **overrides)


if __name__ == "__main__":
    main()
