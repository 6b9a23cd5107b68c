"""A weight's change as a product of two thin matrices: the singular value decomposition, cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xpatch.patches.types import LowRankDelta


@dataclass(frozen=True)
class Cut:
    """down `[R, D_in]`, up `[D_out, R]`; error: `‖Δ - up·down‖ / ‖Δ‖` in the Frobenius norm, the smallest a product of this rank can have."""

    down: torch.Tensor
    up: torch.Tensor
    error: float

    @property
    def product(self) -> torch.Tensor:
        """`[D_out, D_in]`."""
        return self.up @ self.down

    def at(self, site: str) -> LowRankDelta:
        """The patch beside the linear layer `site`."""
        return LowRankDelta(site, self.down, self.up)


def cut(delta: torch.Tensor, rank: int) -> Cut:
    """delta `[D_out, D_in]` as the nearest product of `rank` (at most the smaller side) columns and rows (Eckart and Young 1936)."""
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    error = float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt().clamp_min(1e-300))
    return Cut((root[:, None] * v[:rank]).to(delta).contiguous(), (u[:, :rank] * root).to(delta).contiguous(), error)
