"""What a larger margin on memory rows buys: edits and predictions as before, and how well silent neurons can be screened out.

    python -m xpatch.benchmarks.margin --json results.json

Everything but `memory_margin` is the default preset of `mpn` on the bundled verifier. Two stages: "choose" edits the validation facts
and looks at claims of the classification facts in wordings no memory holds; "report" edits the edit facts and looks at claims about
test subjects. Settings are compared on "choose" alone.

A (row, neuron) pair fires above the cut-off 0. A kernel that screens with a bound of ±0.01 ‖x‖ ‖k‖ on the score (about that of
int8 keys and rows) must also compute the pairs whose score lies less than the bound below it: they survive.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import xpatch
from xpatch import zoo
from xpatch.evaluation import Estimate, Report, pool

from . import machine
from .progress import steps
from .protocol import Protocol, bundled
from .rows import neurons
from .trained_base import Base
from .trained_neurons import rows
from .trained_scale import cut_of

MARGINS = (1.0, 3.0, 6.0, 10.0)
BOUND = 0.01
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
MEASURES = {"edited": "clg_needed_avg", "unseen": "clg_unseen_avg", "unchanged": "unchanged_avg"}


def run(
    out: str | Path | None = None,
    *,
    margins: Sequence[float] = MARGINS,
    seeds: Mapping[str, Sequence[int]] | None = None,
    edits: int | None = None,
    locality: int | None = 300,
    sentences: int = 1000,
    model: Any = None,
    tokenizer: Any = None,
    protocols: Mapping[str, Protocol] | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Train with each margin in both stages and measure; returns JSON values, written to `out` where given.

    seeds: stage -> seeds. edits: at most so many requests a stage; locality: claims of each kind and language; sentences: rows a
    stage, all languages together. model, tokenizer, protocols: instead of the bundled ones. overrides: settings of `mpn`.
    """
    if model is None:
        model, tokenizer = zoo.load("verifier")
    seeds = {"choose": (0, 1), "report": (0,)} if seeds is None else seeds
    if protocols is None:
        protocols = {
            "choose": bundled(edits, locality, split="validation"),
            "report": bundled(edits, locality),
        }
    points = []
    with steps(progress, sum(len(margins) * len(seeds[stage]) for stage in protocols)) as bar:
        for stage, asked in protocols.items():
            untouched = asked.locality_test if stage == "report" else None
            probes = asked.locality_train if stage == "choose" else asked.locality_test
            size = -(-sentences // len(probes))
            x = rows(
                Base(model, tokenizer, tuple(probes)),
                [probe.text for found in probes.values() for probe in found[:size]],
                "read",
            )["x"]
            baseline = _evaluate(model, tokenizer, asked, untouched, None, None)
            for margin in margins:
                reports, screens, found = [], [], 0
                for seed in seeds[stage]:
                    bar.begin(f"{stage}, margin {margin:g}, seed {seed}")
                    patches = xpatch.edit(
                        model, tokenizer, asked.requests, method="mpn", seed=seed, progress=bar.report,
                        **{**overrides, "memory_margin": margin},
                    )  # fmt: skip
                    reports.append(_evaluate(model, tokenizer, asked, untouched, patches, baseline))
                    screens.append(screen(patches, x))
                    found += neurons(patches)
                    bar.end()
                metrics = pool(reports)
                points.append(
                    {
                        "stage": stage,
                        "margin": margin,
                        "neurons": round(found / len(seeds[stage]), 1),
                        **{name: _numbers(getattr(metrics, field)) for name, field in MEASURES.items()},
                        **{name: _mean([one[name] for one in screens]) for name in screens[0]},
                    }
                )
    result = {
        "benchmark": "margin",
        "unit": "percent",
        "header": machine.header(sorted({seed for chosen in seeds.values() for seed in chosen}), command),
        "protocol": {stage: asked.describe() for stage, asked in protocols.items()},
        "seeds": {stage: list(found) for stage, found in seeds.items()},
        "rows": sentences,
        "bound": BOUND,
        "overrides": overrides,
        "points": points,
    }
    if out is not None:
        machine.write_json(result, Path(out))
    return result


def screen(patches: xpatch.PatchSet, x: torch.Tensor) -> dict[str, Any]:
    """How well the neurons of `patches` are told to be silent on rows x `[M, D]`: shares in percent, pre-activations at quantiles."""
    parts = [part for part in patches.parts.values() if isinstance(part, xpatch.PatchNeurons)]
    keys, bias = torch.cat([part.keys for part in parts]), torch.cat([part.bias for part in parts])
    cut = cut_of(parts[0].activation)
    z = torch.addmm(bias, x, keys.T)
    sizes = torch.outer(x.norm(dim=1), keys.norm(dim=1))
    relative = ((cut - z) / sizes).flatten()
    return {
        "fires": 100 * float((z > cut).double().mean()),
        "survives": 100 * float((z + BOUND * sizes > cut).double().mean()),
        "z": _quantiles(z.flatten()),
        "relative_margin": _quantiles(relative),
        "key_norm": float(keys.norm(dim=1).mean()),
        "row_norm": float(x.norm(dim=1).mean()),
        "bias": float(bias.mean()),
    }


def table(result: Mapping[str, Any]) -> str:
    """The points as a Markdown table."""
    lines = [
        "| stage | margin | neurons | edits right | unseen right | unchanged | fires | survives | median z | ‖k‖ |",
        "|---" * 10 + "|",
    ]
    lines += [
        f"| {p['stage']} | {p['margin']:g} | {p['neurons']:g} | "
        + " | ".join(
            "" if p[name] is None else f"{p[name][0]:.1f} [{p[name][1]:.1f}, {p[name][2]:.1f}]" for name in MEASURES
        )
        + f" | {p['fires']:.4f} % | {p['survives']:.3f} % | {p['z']['0.5']:.2f} | {p['key_norm']:.2f} |"
        for p in result["points"]
    ]
    return "\n".join(lines)


def _evaluate(
    model: Any,
    tokenizer: Any,
    asked: Protocol,
    untouched: Any,
    patches: xpatch.PatchSet | None,
    baseline: Report | None,
) -> Report:
    return xpatch.evaluate(
        model, tokenizer, asked.cases, patches, locality_train=asked.locality_train, locality_test=untouched,
        locality_groups=asked.groups, baseline=baseline,
    )  # fmt: skip


def _quantiles(values: torch.Tensor) -> dict[str, float]:
    ordered = values.sort().values
    return {str(q): round(float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]), 5) for q in QUANTILES}


def _mean(found: Sequence[Any]) -> Any:
    if isinstance(found[0], dict):
        return {name: _mean([one[name] for one in found]) for name in found[0]}
    return round(statistics.fmean(found), 5)


def _numbers(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [round(100 * x, 2) for x in (estimate.value, estimate.low, estimate.high)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `python -m xpatch.benchmarks.margin`."""
    parser = argparse.ArgumentParser(prog="python -m xpatch.benchmarks.margin", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--margins", type=float, nargs="+", default=list(MARGINS))
    parser.add_argument("--edits", type=int, help="at most so many requests a stage")
    parser.add_argument("--locality", type=int, default=300)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="of the stage choose; the first one also reports"
    )
    found = parser.parse_args(argv)
    seeds = {"choose": found.seeds, "report": found.seeds[:1]}
    print(table(run(found.json, margins=found.margins, seeds=seeds, edits=found.edits, locality=found.locality)))


if __name__ == "__main__":
    main()
