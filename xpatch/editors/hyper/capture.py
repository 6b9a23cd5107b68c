"""The gradient of an edit as its factors: per token, what enters a linear and the loss's derivative by what leaves it.

`dLoss/dW = Σ_t delta_t x_tᵀ`, so both hyper-networks need one forward and one backward, and no parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from xpatch.editors.hyper.sites import EditedLinear
from xpatch.models.readers import every_row
from xpatch.models.surgery import Surgery


@dataclass(frozen=True, eq=False)
class Signals:
    """M token rows of E edits at one linear: x `[M, D_in]`, delta `[M, D_out]`, owner `[M]` (the edit's number, ascending).

    Rows where x or delta is all zero (padding; all but the read token in a classifier's last layer) are left out.
    """

    x: torch.Tensor
    delta: torch.Tensor
    owner: torch.Tensor


def capture(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    wanted: Callable[[torch.Tensor], torch.Tensor],
    linears: Sequence[EditedLinear],
    autocast: Any = None,
) -> tuple[dict[str, Signals], torch.Tensor, torch.Tensor]:
    """(linear name -> signals, labels `[E]`, logits `[E, C]`) of one batch of E edits.

    wanted: logits -> the label each edit should get. The losses of all edits are summed and go backward at once: an input's
    gradient does not depend on its neighbours, so splitting the rows by edit is exact (LiME calls it virtual edits).
    The model must be in eval mode with its parameters' gradients off (`guard.untouched`).
    """
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {item.name: [] for item in linears}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output.requires_grad_(True)
            seen[name].append((args[0].detach(), output))
            return output

        return hook

    with Surgery() as surgery, every_row(), torch.enable_grad():
        for item in linears:
            surgery.after(model.get_submodule(item.name), keep(item.name))
        with autocast() if autocast is not None else torch.enable_grad():
            logits = model(**inputs).logits.float()
        labels = wanted(logits.detach())
        loss = F.cross_entropy(logits, labels, reduction="sum")
        outputs = [output for calls in seen.values() for _, output in calls]
        gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    found = {}
    for item in linears:
        calls = [(x, output, next(gradients)) for x, output in seen[item.name]]
        # A layer shared by several depths runs more than once; its gradient is the sum over all runs.
        xs = torch.cat([x.flatten(1, -2) for x, _, _ in calls], 1).float()
        deltas = torch.cat([(torch.zeros_like(y) if d is None else d).flatten(1, -2) for _, y, d in calls], 1).float()
        used = (xs != 0).any(-1) & (deltas != 0).any(-1)
        found[item.name] = Signals(xs[used], deltas[used], used.nonzero()[:, 0])
    return found, labels, logits.detach()
