"""Scaled coordinates for keys: one learning rate then suits models whose FFN inputs are far longer or shorter than BERT's."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Coordinates:
    """`forward(x) = (x - mean) / deviation`. mean `[D]`; deviation: one number for all coordinates."""

    mean: torch.Tensor
    deviation: torch.Tensor

    @staticmethod
    def scaled(rows: torch.Tensor) -> Coordinates:
        """Centred on `rows` `[M, D]` and divided by their mean standard deviation; fewer than two rows change nothing."""
        if len(rows) < 2:
            return Coordinates(rows.new_zeros(rows.shape[1]), rows.new_ones(()))
        variance = rows.double().var(0).mean().clamp_min(1e-12)
        return Coordinates(rows.double().mean(0).to(rows), variance.sqrt().to(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., D]` in these coordinates."""
        return (x - self.mean) / self.deviation

    def fold(self, keys: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """keys `[E, P, D]` and bias `[E, P]` trained on `forward(x)`, for x itself."""
        plain = keys.double() / self.deviation.double()
        return plain.to(keys), (bias.double() - plain @ self.mean.double()).to(bias)
