"""Trained patches beside the final FFN of another model, so that they fire as they do where they were trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import xpatch
from xpatch import ops

from .model_shapes import Subject

CASE_ROWS, CASE_WIDTH = 256, 768


def case_for(width: int, neurons: int, seed: int, cases: Callable[..., Any] | None = None) -> Any:
    """`neurons` patches of the default preset, of `width` where that many were trained, else of 768."""
    if cases is None:
        from . import trained

        cases = trained.cases
    wanted: dict[str, Any] = {"neurons": neurons, "rows": CASE_ROWS, "seed": seed, "progress": False}
    try:
        return cases("default", width=width, **wanted)
    except xpatch.XpatchError:
        if width < CASE_WIDTH:
            raise
        return cases("default", width=CASE_WIDTH, **wanted)


def place(case: Any, x: Tensor, y: Tensor, site: str, seed: int = 0) -> tuple[xpatch.PatchNeurons, dict[str, float]]:
    """The case's neurons for a model whose final FFN gives `y [R, D]` on the rows `x [R, D]` that its head reads; and shares.

    Weights at random have other hidden states than those the patches were trained on, so: keys of another width are turned by a
    random isometry; keys and values are scaled by the ratio of the rows' norms; each bias is set so that the neuron's mean
    pre-activation is what it was, and one shift of all biases lets the same share of (row, neuron) pairs fire. Returns that
    share as `wanted_share`, and `fired_share`, what fires on x.
    """
    x, y = x.float(), y.float()
    keys, values = _turn(case.keys.float(), case.values.float(), x.shape[1], seed)
    keys = keys * (_norm(case.x) / _norm(x))
    values = values * (_norm(y) / _norm(case.y))
    trained = F.linear(case.x.float(), case.keys.float(), case.bias.float())
    wanted = float((trained > 0).float().mean())
    scores = F.linear(x, keys)
    bias = trained.mean(0) - scores.mean(0)
    scores = scores + bias
    bias = bias - _border(scores, wanted)
    neurons = xpatch.PatchNeurons(site, keys, bias, values, case.activation)
    return neurons, {"wanted_share": wanted, "fired_share": fired_share(x, neurons)}


def fired_share(x: Tensor, neurons: xpatch.PatchNeurons) -> float:
    """The share of (row, neuron) pairs above zero on `x [R, D]`."""
    return float((F.linear(x.float(), neurons.keys, neurons.bias) > 0).float().mean())


@contextmanager
def watched(model: Any, subject: Subject) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, each call of the model adds the final FFN's (input, output), `[B, T, D]` each."""
    entered: list[Tensor] = []
    found: list[tuple[Tensor, Tensor]] = []
    handles = [
        model.get_submodule(subject.reads).register_forward_pre_hook(lambda module, args: entered.append(args[0])),
        model.get_submodule(subject.adds).register_forward_hook(
            lambda module, args, output: found.append((entered[-1], output))
        ),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def beside(model: Any, subject: Subject, neurons: xpatch.PatchNeurons) -> Callable[[], None]:
    """Patches as a user would write them: a hook that adds two dense matmuls on every row. Returns what takes it off."""
    inside: list[Tensor] = []
    down = model.get_submodule(subject.adds)
    dtype = next(down.parameters()).dtype
    keys, bias, values = (tensor.to(dtype) for tensor in (neurons.keys, neurons.bias, neurons.values))

    def enter(module: Any, args: tuple[Tensor, ...]) -> None:
        inside.append(args[0])

    def leave(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + ops.activate(F.linear(inside.pop(), keys, bias), neurons.activation) @ values

    entering = model.get_submodule(subject.reads).register_forward_pre_hook(enter)
    leaving = down.register_forward_hook(leave)

    def undo() -> None:
        entering.remove()
        leaving.remove()

    return undo


@torch.no_grad()
def read_row(model: Any, subject: Subject, ids: Tensor) -> int:
    """0 or -1: the row of the final FFN's output that a classifier's logits on `ids [B, T]` hang on.

    Raises `XpatchError` where it is neither the first nor the last one alone.
    """
    base = model(input_ids=ids).logits
    moved = []
    for row in (0, -1):
        kick = torch.zeros(ids.shape[1], 1)
        kick[row] = 1
        handle = model.get_submodule(subject.adds).register_forward_hook(
            lambda module, args, output, kick=kick: output + kick * torch.randn(output.shape[-1])
        )
        try:
            moved.append(not torch.equal(model(input_ids=ids).logits, base))
        finally:
            handle.remove()
    if moved[0] == moved[1]:
        raise xpatch.XpatchError(
            f"latency benchmark: expected a head of {type(model).__name__} that reads the first or the last row of its final FFN, "
            f"found {'both' if moved[0] else 'neither'}; measure a model with another head"
        )
    return 0 if moved[0] else -1


def _turn(keys: Tensor, values: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[N, D]` in another, larger width, all lengths and angles kept."""
    if keys.shape[1] == width:
        return keys, values
    draw = torch.Generator().manual_seed(seed)
    isometry = torch.linalg.qr(torch.randn(width, keys.shape[1], generator=draw)).Q.t()
    return keys @ isometry, values @ isometry


def _norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows.float(), dim=1).mean())


def _border(scores: Tensor, share: float) -> float:
    """The value that this share of the scores lies above."""
    above = min(round(share * scores.numel()), scores.numel() - 1)
    top = scores.flatten().topk(above + 1).values
    return float(top[-1])
