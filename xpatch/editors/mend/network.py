"""MEND's network: per shape of matrix, one residual MLP over the concatenated factors (x, delta) of each token (eq. 3-4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from xpatch.editors.hyper.capture import Signals
from xpatch.editors.hyper.lowrank import Factors
from xpatch.editors.hyper.network import Blueprint, Condition, HyperNetwork
from xpatch.editors.hyper.sites import EditedLinear
from xpatch.editors.mend.normalise import normaliser


def relu(z: torch.Tensor) -> torch.Tensor:
    """`max(z, 0)` with derivative 1 at 0. All pre-activations are 0 at the start: a derivative of 0 there trains nothing, ever.

    (`clamp(min=0)`, which the reference relies on, has the derivative 1 there only up to torch 2.13.)
    """
    return torch.where(z >= 0, z, 0)


class ResidualLayer(nn.Module):
    """`y + relu(s_m (U V y + bias) + t_m)` (eq. 3b); the scale s and shift t belong to the matrix m, all else is shared."""

    def __init__(self, width: int, rank: int, matrices: int, spread: float, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, width, generator=generator) * spread)  # V
        self.up = nn.Parameter(torch.zeros(width, rank))  # U
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(matrices, width))
        self.shift = nn.Parameter(torch.zeros(matrices, width))

    def forward(self, y: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """y `[M, D_in + D_out]`, matrix `[M]` -> the same shape."""
        z = (y @ self.down.T) @ self.up.T + self.bias
        return y + relu(self.scale[matrix] * z + self.shift[matrix])


class ShapeNetwork(nn.Module):
    """The network of all matrices of one shape: normalise, two residual layers, split."""

    def __init__(self, shape: tuple[int, int], matrices: int, settings: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.inside, width = shape[0], sum(shape)
        rank = min(settings.rank, width)
        self.norm_x = normaliser(settings.normalisation, shape[0], settings.epsilon)
        self.norm_delta = normaliser(settings.normalisation, shape[1], settings.epsilon)
        self.layers = nn.ModuleList(ResidualLayer(width, rank, matrices, settings.spread, generator) for _ in range(2))

    def forward(self, x: torch.Tensor, delta: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x `[M, D_in]`, delta `[M, D_out]`, matrix `[M]` -> the pseudo-activations and pseudo-deltas, of the same shapes."""
        y = torch.cat((self.norm_x(x), self.norm_delta(delta)), -1)
        for layer in self.layers:
            y = layer(y, matrix)
        return y[:, : self.inside], y[:, self.inside :]


class Mend(HyperNetwork):
    """`ΔW_m = alpha_m Σ_t delta~_t x~_tᵀ`, added to W (the paper subtracts; alpha's sign is free, so it is learned)."""

    def __init__(self, linears: Sequence[EditedLinear], settings: Any, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linears = tuple(linears)
        self.shapes = tuple(dict.fromkeys(item.shape for item in self.linears))
        self.networks = nn.ModuleList(
            ShapeNetwork(shape, sum(item.shape == shape for item in self.linears), settings, generator)
            for shape in self.shapes
        )
        self.alpha = nn.Parameter(torch.full((len(self.linears),), float(settings.alpha)))

    def forward(self, signals: Mapping[str, Signals], condition: Condition | None = None) -> dict[str, Factors]:
        """Linear name -> factors with alpha folded into `up`; rank at most T."""
        found: dict[str, Factors] = {}
        for shape, network in zip(self.shapes, self.networks, strict=True):
            members = [(number, item) for number, item in enumerate(self.linears) if item.shape == shape]
            rows = [signals[item.name] for _, item in members]
            sizes = [len(row.x) for row in rows]
            place = torch.arange(len(members), device=rows[0].x.device).repeat_interleave(
                torch.tensor(sizes, device=rows[0].x.device)
            )
            x, delta = network(torch.cat([row.x for row in rows]), torch.cat([row.delta for row in rows]), place)
            for (number, item), row, one, two in zip(members, rows, x.split(sizes), delta.split(sizes), strict=True):
                found[item.name] = Factors(one, self.alpha[number] * two, row.owner)
        return {item.name: found[item.name] for item in self.linears}

    def group_of(self, name: str) -> str:
        return "step" if name == "alpha" else "main"


def build(plan: Blueprint) -> Mend:
    """A fresh network for the linears of `plan`."""
    return Mend(plan.linears, plan.settings, plan.seed)
