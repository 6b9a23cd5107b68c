"""Small cases whose ratios are committed: what `make bench` times with pytest-benchmark, and holds against the last baseline.

    python -m xpatch.benchmarks.baseline

measures them again and writes `results/baseline.json`. Only ratios are kept: absolute times belong to a machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import xpatch
from xpatch.ops import native

from . import kernel_point, machine, model_latency
from .latency import measured
from .model_shapes import subject

PATH = Path(__file__).parent / "results" / "baseline.json"
#: A ratio may be so many times its baseline, and a kernel so many times dense PyTorch, before the check fails.
MARGIN, BEHIND = 2.0, 1.5
ATTEMPTS = 3
KERNEL_ROWS, KERNEL_NEURONS, WIDTH = (1, 32, 256), 5_000, 768
KERNEL_CASES = {f"{kind}-m{rows}": (kind, rows) for kind in ("default", "paper", "adversarial") for rows in KERNEL_ROWS}
LATENCY_CASES = {"bert-b1-t32": (1, 32), "bert-b8-t32": (8, 32)}
_LAYERS = 2  # of BERT-base's width
_CLASSIFIER_PATCHES = 1000


@functools.lru_cache(maxsize=1)
def patches(
    kind: str, cases: Callable[..., Any] | None = None, neurons: int = KERNEL_NEURONS, width: int = WIDTH
) -> kernel_point.Loaded:
    """The patches of a kernel case in fp32, packed."""
    if cases is None:
        from . import trained

        cases = trained.cases
    return kernel_point.load(
        cases(kind, neurons=neurons, rows=max(KERNEL_ROWS), width=width, seed=0, progress=False), torch.float32
    )


def kernel_calls(loaded: kernel_point.Loaded, rows: int) -> dict[str, Callable[[], Any]]:
    """ "dense" and "kernel" on the same M rows."""
    x = loaded.x[:rows]
    weights = (loaded.keys, loaded.bias, loaded.values, loaded.activation)
    return {
        "dense": lambda: kernel_point.dense(x, *weights),
        "kernel": functools.partial(kernel_point.kernel(loaded), x),
    }


def latency_calls(
    batch: int, tokens: int, cases: Callable[..., Any] | None = None, **sizes: Any
) -> dict[str, Callable[[], Any]]:
    """ "patched", "unpatched" and the other sides of the latency benchmark on a BERT of few layers."""
    one = subject("bert-base", **{"num_hidden_layers": _LAYERS, **sizes})
    return model_latency.Bench(one, _CLASSIFIER_PATCHES, 0, cases).calls(batch, tokens)[0]


@torch.no_grad()
def ratio(calls: Mapping[str, Callable[[], Any]], one: str, other: str) -> float:
    """The time of one call over that of another: medians, interleaved."""
    times, _, _ = measured({name: calls[name] for name in (one, other)})
    return round(times[one]["p50_ms"] / times[other]["p50_ms"], 4)


def read(path: Path = PATH) -> dict[str, Any]:
    """The committed baseline; empty ratios where there is none."""
    if not path.is_file():
        return {"isa": None, "kernel": {}, "latency": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def check(case: str, part: str, measure: Callable[[], float], baseline: Mapping[str, Any]) -> float:
    """The ratio that `measure` gives. Raises `BackendError` where each of `ATTEMPTS` ratios is more than `MARGIN` times its baseline, or
    a kernel behind dense by more than `BEHIND`: noise passes, a slower kernel stays.

    A baseline of another instruction set says nothing about this one.
    """
    isa = native.info().get("isa")
    limits = {"by dense PyTorch": BEHIND} if part == "kernel" else {}
    known = baseline[part].get(case)
    if known is not None and baseline["isa"] == isa:
        limits[f"by the baseline {known:g}"] = MARGIN * known
    limit = min(limits.values(), default=math.inf)
    found = []
    for _ in range(ATTEMPTS):
        found.append(measure())
        if found[-1] <= limit:
            return found[-1]
    raise xpatch.BackendError(
        f"{part} benchmark, case {case}: expected a ratio of at most {limit:.3g} ({min(limits, key=lambda why: limits[why])}), found "
        f"{', '.join(f'{ratio:.3g}' for ratio in found)} on ISA {isa}; run it again on a quiet machine, then look for what made it slow"
    )


def main() -> None:
    """The command line of `python -m xpatch.benchmarks.baseline`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=PATH)
    path = parser.parse_args().json
    ratios: dict[str, dict[str, float]] = {"kernel": {}, "latency": {}}
    for name, (kind, rows) in KERNEL_CASES.items():
        ratios["kernel"][name] = ratio(kernel_calls(patches(kind), rows), "kernel", "dense")
    for name, (batch, tokens) in LATENCY_CASES.items():
        ratios["latency"][name] = ratio(latency_calls(batch, tokens), "patched", "unpatched")
    result = {
        "benchmark": "baseline",
        "header": machine.header([0]),
        "isa": native.info().get("isa"),
        **ratios,
    }
    machine.write_json(result, path)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
