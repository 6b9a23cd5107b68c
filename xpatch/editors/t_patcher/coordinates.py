"""Coordinates in which keys are trained, and the way back: one learning rate then suits all directions, and all models."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Coordinates:
    """`forward(x) = (x - mean) · scale`. mean `[D]`; scale: one number for all coordinates `[]`, or a symmetric matrix `[D, D]`."""

    mean: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def scaled(rows: torch.Tensor) -> Coordinates:
        """Centred on `rows` `[M, D]` and divided by their mean standard deviation; fewer than two rows change nothing."""
        if len(rows) < 2:
            return Coordinates(rows.new_zeros(rows.shape[1]), rows.new_ones(()))
        variance = rows.double().var(0).mean().clamp_min(1e-12)
        return Coordinates(rows.double().mean(0).to(rows), variance.rsqrt().to(rows))

    @staticmethod
    def whitened(rows: torch.Tensor) -> Coordinates:
        """Centred on `rows` `[M, D]`, and whitened half way: their covariance is taken as its mean with that of `scaled`.

        Directions in which texts vary much anyway (their wording, their language) are shortened, so what tells one claim from another
        counts as much in training. Whitened all the way, keys would rest on directions in which the memory hardly varies, and
        fire at texts of other kinds, which do vary there. Fewer than two rows change nothing.
        """
        if len(rows) < 2:
            return Coordinates.scaled(rows)
        exact = rows.double()
        covariance = torch.cov(exact.T).view(rows.shape[1], rows.shape[1])
        spread = covariance.diagonal().mean().clamp_min(1e-12)
        variances, directions = torch.linalg.eigh((covariance + spread * torch.eye(len(covariance)).to(covariance)) / 2)
        return Coordinates(exact.mean(0).to(rows), ((directions * variances.rsqrt()) @ directions.T).to(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., D]` in these coordinates."""
        return self._by(x - self.mean)

    def fold(self, keys: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """keys `[E, P, D]` and bias `[E, P]` trained on `forward(x)`, for x itself."""
        plain = Coordinates(self.mean.double(), self.scale.double())._by(keys.double())
        return plain.to(keys), (bias.double() - plain @ self.mean.double()).to(bias)

    def _by(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.scale if self.scale.ndim else x * self.scale
