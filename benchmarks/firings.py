"""What counting firings costs: one model call with the counters on against off.

    python -m xpatch.benchmarks.firings --json results.json

BERT-base with random weights (12 layers, D = 768, F = 3072), N ReLU patch neurons at its last FFN but one, which fire for 0.1 % of all
(token, neuron) pairs. (At the final FFN a classifier's counters look at one token of each input, which costs less.) The same call is measured three times over, in turn: counters off, on, and off again. The two "off" columns differ by nothing but the
machine's noise, so a cost below that difference is not told from zero.

The counters' own work is a fraction of a millisecond, so it is also measured where it can be seen: on patches beside the first of
two thin layers of the same width. That difference in ms, over the call of the full model, is `added_percent`.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import xpatch

from . import machine
from .latency import measure
from .progress import steps

SHAPES = ((8, 32), (1, 32))
COUNTS = (1000, 5000)
SHARE = 0.001
THIN = 64  # inner width of the thin layer
THIN_REPEATS = 5  # a thin call takes a few ms


def run(
    out: str | Path | None = None,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    counts: Sequence[int] = COUNTS,
    layers: int = 12,
    width: int = 768,
    repeats: int = 51,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure every (batch, tokens) shape with every number of neurons; returns JSON values, written to `out` where given.

    Each point: medians in ms with the counters off, on and off again, `cost_percent` of "on" over the mean of both "off",
    `noise_percent`, the difference of the two "off", and `added_ms` and `added_percent` by way of the thin layer. repeats: timed
    calls of each kind, at least 15.
    """
    torch.manual_seed(0)
    model, thin = _bert(layers, width, 4 * width), _bert(2, width, THIN)
    points = []
    with steps(progress, len(shapes) * len(counts)) as bar:
        for batch, tokens in shapes:
            inputs = torch.randint(5, 1000, (batch, tokens))
            for neurons in counts:
                bar.begin(f"{batch} x {tokens}, {neurons} neurons")
                point = _point(_times(model, inputs, layers - 2, neurons, repeats))
                alone = _times(thin, inputs, 0, neurons, THIN_REPEATS * repeats)
                added = alone["on"]["p50_ms"] - (alone["off"]["p50_ms"] + alone["off again"]["p50_ms"]) / 2
                share = {"added_ms": round(added, 4), "added_percent": round(100 * added / point["off_p50_ms"], 3)}
                points.append({"batch": batch, "tokens": tokens, "neurons": neurons, **point, **share})
                bar.end()
    result = {
        "benchmark": "firings",
        "unit": "ms",
        "header": machine.header([0], command),
        "layers": layers,
        "width": width,
        "repeats": repeats,
        "points": points,
    }
    if out is not None:
        machine.write_json(result, Path(out))
    return result


def _times(model: Any, inputs: torch.Tensor, layer: int, neurons: int, repeats: int) -> dict[str, dict[str, float]]:
    """Of each kind of call what `measure` gives; and under "fired" the share of (token, neuron) pairs that fired, in percent."""
    part, share = _neurons(model, inputs, layer, neurons)
    patches = xpatch.PatchSet(parts={"neurons": part})
    counting = {"off": False, "on": True, "off again": False}
    calls = {}
    for name, count in counting.items():
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = xpatch.apply(copy.deepcopy(model, shared), patches, name="fixes")  # the same weights, at the same place
        xpatch.status(twin, count=count)
        calls[name] = functools.partial(_call, twin, inputs)
    return {**measure(calls, repeats), "fired": {"percent": round(100 * share, 3)}}


def _point(times: dict[str, dict[str, float]]) -> dict[str, float]:
    off, on, again = (times[name]["p50_ms"] for name in ("off", "on", "off again"))
    base = (off + again) / 2
    return {
        "fired_percent": times["fired"]["percent"],
        "off_p50_ms": off,
        "on_p50_ms": on,
        "off_again_p50_ms": again,
        "off_iqr_ms": times["off"]["iqr_ms"],
        "cost_percent": round(100 * (on - base) / base, 3),
        "noise_percent": round(100 * abs(again - off) / base, 3),
    }


@torch.no_grad()
def _call(model: Any, inputs: torch.Tensor) -> None:
    model(input_ids=inputs)


def _bert(layers: int, width: int, inner: int) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=inner,
    )
    return transformers.BertForSequenceClassification(config).eval()


def _neurons(model: Any, inputs: torch.Tensor, layer: int, count: int) -> tuple[xpatch.PatchNeurons, float]:
    """Random keys whose biases let about the share `SHARE` of all (token, neuron) pairs of `inputs` fire, and the share that does."""
    site = f"bert.encoder.layer.{layer}"
    seen: list[torch.Tensor] = []
    up = model.get_submodule(f"{site}.intermediate.dense")
    handle = up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        _call(model, inputs)
    finally:
        handle.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1])
    keys = torch.randn(count, x.shape[1]) / x.shape[1] ** 0.5
    scores = x @ keys.t()
    standard = (scores - scores.mean(0)) / scores.std(0)
    fires = max(1, round(SHARE * standard.numel()))
    border = standard.flatten().topk(fires + 1).values[-1]
    bias = -(scores.mean(0) + border * scores.std(0))
    share = float(((scores + bias) > 0).float().mean())
    return xpatch.PatchNeurons(site, keys, bias, 0.01 * torch.randn(count, x.shape[1]), "relu"), share


def table(result: dict[str, Any]) -> str:
    """The points as Markdown."""
    head = (
        "batch x tokens",
        "neurons",
        "fired",
        "off ms",
        "on ms",
        "off again ms",
        "cost",
        "noise",
        "added ms",
        "added",
    )
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [
        f"| {p['batch']} x {p['tokens']} | {p['neurons']} | {p['fired_percent']} % | {p['off_p50_ms']:.2f} | {p['on_p50_ms']:.2f} "
        f"| {p['off_again_p50_ms']:.2f} | {p['cost_percent']:+.2f} % | {p['noise_percent']:.2f} % "
        f"| {p['added_ms']:.3f} | {p['added_percent']:+.2f} % |"
        for p in result["points"]
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m xpatch.benchmarks.firings", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="result file")
    parser.add_argument("--repeats", type=int, default=51, help="timed calls of each kind, at least 15")
    arguments = parser.parse_args(argv)
    print(table(run(arguments.json, repeats=arguments.repeats)))


if __name__ == "__main__":
    main()
