"""Scaling of the gradient's factors before MEND's network: running statistics (MEND) or an affine LayerNorm (LiME)."""

from __future__ import annotations

import torch
from torch import nn


class RunningNorm(nn.Module):
    """`(v - mean) / (std + 1e-7)` per coordinate, over every row seen in training; frozen in eval mode (MEND, section 3.2).

    The number of rows seen is a buffer like the statistics, so a resumed training goes on with them; the reference keeps its
    "first row seen" flag outside the buffers and starts them anew. Rows of all processes count.
    """

    mean: torch.Tensor
    squares: torch.Tensor
    count: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))  # Σ (v - mean)²
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows `[M, D]` -> `[M, D]`; in training mode the rows count first."""
        if self.training:
            self.see(rows)
        if float(self.count) < 2:
            return rows - self.mean
        deviation = (self.squares / (self.count - 1)).sqrt().to(rows)
        return (rows - self.mean) / (deviation + 1e-7)

    @torch.no_grad()
    def see(self, rows: torch.Tensor) -> None:
        """Add rows to the statistics (Chan et al.'s merge of two sets of moments, in float64)."""
        rows = rows.double()
        moments = torch.cat((rows.new_full((1,), float(len(rows))), rows.sum(0)))
        _sum_over_processes(moments)
        new, mean = moments[0], moments[1:] / moments[0].clamp_min(1)
        squares = (rows - mean).square().sum(0)
        _sum_over_processes(squares)
        if float(new) == 0:
            return
        total = self.count + new
        shift = mean - self.mean
        self.squares.add_((squares + shift.square() * (self.count * new / total)).to(self.squares))
        self.mean.add_((shift * (new / total)).to(self.mean))
        self.count.copy_(total)


def normaliser(kind: str, width: int, epsilon: float) -> nn.Module:
    """ "running": MEND's; "layernorm": LiME's, with an affine part."""
    return RunningNorm(width) if kind == "running" else nn.LayerNorm(width, eps=epsilon)


def _sum_over_processes(values: torch.Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
