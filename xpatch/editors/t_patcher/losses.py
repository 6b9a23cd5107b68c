"""The losses of Transformer-Patcher (section 4.2), for many edits side by side: each returns one value per edit `[E]`.

`z` is a pre-activation `x·k + b`. Axes: `E` edits, `R` rows of one edit's batch, `M` memory rows, `C` classes.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def task_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, penalty: float, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy minus `penalty` times the entropy of the prediction (the confidence penalty of the base's training).

    logits `[E, R, C]`, labels `[E, R]`, weights `[E, R]` (rows of weight 0 do not count). For two classes this equals the
    reference's binary form: the softmax over two logits is the sigmoid of their difference, with the same entropy.
    smoothing: the share of the label's weight that all classes get evenly (label smoothing, as for BART).
    """
    log_p = F.log_softmax(logits, dim=-1)
    cross = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if smoothing:
        cross = (1 - smoothing) * cross - smoothing * log_p.mean(-1)
    if penalty:
        cross = cross - penalty * -(log_p.exp() * log_p).sum(-1)
    return (cross * weights).sum(-1) / weights.sum(-1)


def activation_loss(z: torch.Tensor, top: int = 5) -> torch.Tensor:
    """The edit's own rows must fire: the mean of the `top` largest `exp(-z)`. z `[E, R]`."""
    return torch.exp(-z).topk(min(top, z.shape[1]), dim=1).values.mean(1)


def memory_loss(own: torch.Tensor, memory: torch.Tensor, top: int = 1000, margin: float = 3.0) -> torch.Tensor:
    """Everything else must stay silent: l1 + l2 over all pairs of a memory row j and a batch row i (own `[E, R]`, memory `[E, M]`).

    l1: the mean of the `top` largest `exp(z_j - z_i + margin)`; l2: the mean of the `top` largest `exp(z_j + margin)`, where
    every memory row stands R times, once for each batch row, as in the reference.
    """
    rows = own.shape[1]
    # A pair among the `top` largest has its memory row among the `top` largest: both losses need only those.
    largest = memory.topk(min(top, memory.shape[1]), dim=1).values
    j, i = _largest_pairs(own.detach(), largest.detach(), top)
    relative = torch.exp(largest.gather(1, j) - own.gather(1, i) + margin).mean(1)
    full, rest = divmod(min(top, memory.shape[1] * rows), rows)
    silent = torch.exp(largest[:, : full + 1] + margin)
    absolute = silent[:, :full].sum(1) * rows
    if rest:
        absolute = absolute + silent[:, full] * rest
    return relative + absolute / (full * rows + rest)


def _largest_pairs(own: torch.Tensor, memory: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (j, i) `[E, top]` of the `top` largest `memory_j - own_i`, largest first. memory `[E, M]` falls along each row.

    The a-th smallest own value has a - 1 others before it with every memory row: it can only meet the first `top / a` of them.
    """
    sorted_own, order = own.sort(dim=1)
    lengths = [min(memory.shape[1], top // rank) for rank in range(1, own.shape[1] + 1)]
    pairs = torch.cat([memory[:, :length] - sorted_own[:, a : a + 1] for a, length in enumerate(lengths)], dim=1)
    chosen = pairs.topk(min(top, pairs.shape[1]), dim=1).indices
    j = torch.cat([torch.arange(length) for length in lengths]).to(own.device)
    a = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(own.device)
    return j[chosen], order.gather(1, a[chosen])
