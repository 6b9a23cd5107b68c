"""Low-rank changes of linears as a side path: what a hyper-network makes, how it is tried out, and how it becomes a patch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from xpatch.models.readers import every_row
from xpatch.models.surgery import Surgery


@dataclass(frozen=True, eq=False)
class Factors:
    """`ΔW_e = Σ_{m of edit e} up_m down_mᵀ` of one linear. down `[M, D_in]`, up `[M, D_out]`, owner `[M]`: the edit's number."""

    down: torch.Tensor
    up: torch.Tensor
    owner: torch.Tensor

    def padded(self, edits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(down `[E, R, D_in]`, up `[E, R, D_out]`), R the largest number of rows of one edit; missing rows are zero."""
        order = torch.argsort(self.owner, stable=True)
        owner = self.owner[order]
        counts = torch.bincount(owner, minlength=edits)
        rank = int(counts.max()) if len(counts) else 0
        place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        down = self.down.new_zeros(edits, rank, self.down.shape[1]).index_put((owner, place), self.down[order])
        up = self.up.new_zeros(edits, rank, self.up.shape[1]).index_put((owner, place), self.up[order])
        return down, up

    def of(self, edit: int) -> Factors:
        """The rows of one edit, which then is number 0."""
        mine = self.owner == edit
        return Factors(self.down[mine], self.up[mine], torch.zeros_like(self.owner[mine]))

    def dense(self, edit: int) -> torch.Tensor:
        """ΔW of one edit `[D_out, D_in]`."""
        mine = self.owner == edit
        return self.up[mine].T @ self.down[mine]


@contextmanager
def side_path(model: torch.nn.Module, factors: Mapping[str, Factors], edits: int) -> Iterator[None]:
    """The model as edited: `y += (x downᵀ) up` beside each linear, differentiable in both factors.

    The batch holds B = E·K rows, edit by edit: rows eK .. eK+K-1 see the changes of edit e alone.
    """
    padded = {name: found.padded(edits) for name, found in factors.items()}

    def add(name: str) -> Any:
        down, up = padded[name]

        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            x = args[0].reshape(edits, -1, args[0].shape[-1])
            side = torch.bmm(torch.bmm(x, down.to(x.dtype).transpose(1, 2)), up.to(x.dtype))
            return output + side.reshape(output.shape)

        return hook

    with Surgery() as surgery, every_row():
        for name, (down, _) in padded.items():
            if down.shape[1]:
                surgery.after(model.get_submodule(name), add(name))
        yield
