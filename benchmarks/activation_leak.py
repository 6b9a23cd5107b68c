"""What silent neurons add: answers and leaks of patch neurons, computed from rows of the final FFN read once.

Axes: `M` rows, `D` width, `N` neurons. A neuron is silent on a row where its pre-activation z = x·k + b is below 0; its leak is
act(z) v all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .activation_blocks import Neurons
from .trained_base import Base
from .trained_neurons import rows

ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class Gate:
    """How trained neurons are served: z is lowered by `shift`; with `cut`, silent neurons add nothing at all."""

    shift: float = 0.0
    cut: bool = False


@dataclass(frozen=True)
class Rows:
    """x `[M, D]` enters the final FFN, y `[M, D]` leaves it, at the row the head reads."""

    x: torch.Tensor
    y: torch.Tensor

    @staticmethod
    def read(base: Base, sentences: Sequence[str]) -> Rows:
        """In the order of `sentences`; they are read by length, so that little is padding."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        found = rows(base, [sentences[i] for i in order], "read")
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
        return Rows(found["x"][back], found["y"][back])

    def take(self, index: torch.Tensor) -> Rows:
        """Some of the rows."""
        return Rows(self.x[index], self.y[index])


@dataclass(frozen=True)
class Added:
    """loud, silent `[M, D]`: what neurons above and below z = 0 add; bound `[M]`: the silent ones' norms without cancellation."""

    loud: torch.Tensor
    silent: torch.Tensor
    bound: torch.Tensor


@torch.no_grad()
def added(neurons: Neurons, x: torch.Tensor, gate: Gate = Gate(), block: int = 1024) -> Added:
    """What `neurons`, served through `gate`, add to rows x `[M, D]`."""
    act = ACTIVATE[neurons.activation]
    norms = neurons.values.norm(dim=1)
    parts: list[tuple[torch.Tensor, ...]] = [(torch.zeros(0, x.shape[1]), torch.zeros(0, x.shape[1]), torch.zeros(0))]
    for chunk in x.split(block):
        z = torch.addmm(neurons.bias, chunk, neurons.keys.T)
        gated = act(z - gate.shift)
        silent = z < 0
        quiet = torch.zeros_like(gated) if gate.cut else gated.masked_fill(~silent, 0.0)
        loud = gated.masked_fill(silent, 0.0)
        parts.append((loud @ neurons.values, quiet @ neurons.values, quiet.abs() @ norms))
    return Added(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def answers(base: Base, found: Rows, more: torch.Tensor | None = None) -> torch.Tensor:
    """Class indices `[M]` of a BERT classifier from its final FFN's rows, with `more` `[M, D]` added to the FFN's output."""
    output = found.y if more is None else found.y + more
    hidden = base.model.bert.encoder.layer[-1].output.LayerNorm(output + found.x)
    logits: torch.Tensor = base.model.classifier(base.model.bert.pooler(hidden.unsqueeze(1)))
    return logits.argmax(-1)


def leak(found: Rows, more: Added) -> dict[str, Any]:
    """The silent neurons' sum against the FFN's own output, per row: median, mean and 99 % quantile; `apart`: the mean of the same
    without cancellation between neurons."""
    own = found.y.norm(dim=1)
    share = (more.silent.norm(dim=1) / own).double()
    apart = (more.bound / own).double()
    return {
        "median": _sig(share.median()),
        "mean": _sig(share.mean()),
        "p99": _sig(share.quantile(0.99)),
        "apart": _sig(apart.mean()),
    }


def _sig(value: torch.Tensor) -> float:
    return float(f"{float(value):.4g}")
