"""The patch neurons trained so far, by owner, and what they add to a row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from xpatch.editors.t_patcher.train import ACTIVATE

Change = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Neurons:
    """keys `[N, D]`, bias `[N]`, values `[N, D]`, owner `[N]`: the number of the edit that owns each neuron.

    changes: (sign, keys, bias, values) of neurons that came (1) and went (-1), until somebody has read and emptied them.
    """

    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    owner: torch.Tensor
    activation: str
    changes: list[Change] = field(default_factory=list)

    @staticmethod
    def none(width: int, activation: str, device: torch.device) -> Neurons:
        empty = torch.zeros(0, width, device=device)
        return Neurons(
            empty, empty[:, 0].clone(), empty.clone(), torch.zeros(0, dtype=torch.long, device=device), activation
        )

    def add(self, owners: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> None:
        """Append the neurons of edits `owners` `[E]`: keys `[E, P, D]`, bias `[E, P]`, values `[E, P, D]`."""
        fresh = keys.flatten(0, 1), bias.flatten(), values.flatten(0, 1)
        self.changes.append((1, *fresh))
        self.keys, self.bias, self.values = (
            torch.cat(pair) for pair in zip((self.keys, self.bias, self.values), fresh, strict=True)
        )
        self.owner = torch.cat((self.owner, owners.repeat_interleave(keys.shape[1])))

    def drop(self, owners: torch.Tensor) -> None:
        """Forget the neurons of edits `owners`."""
        keep = ~torch.isin(self.owner, owners)
        if bool(keep.all()):
            return
        self.changes.append((-1, self.keys[~keep], self.bias[~keep], self.values[~keep]))
        self.keys, self.bias, self.values, self.owner = (
            v[keep] for v in (self.keys, self.bias, self.values, self.owner)
        )

    def sort(self) -> None:
        """Order by owner, so that each edit's rows lie together."""
        order = torch.argsort(self.owner, stable=True)
        self.keys, self.bias, self.values, self.owner = (
            v[order] for v in (self.keys, self.bias, self.values, self.owner)
        )

    def inner(self, x: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """`act(x Kᵀ + b)` `[M, N]` of these neurons."""
        return ACTIVATE[self.activation](torch.addmm(bias, x, keys.T))

    def output(self, x: torch.Tensor, block: int = 4096) -> torch.Tensor:
        """`act(x Kᵀ + b) V` for x `[M, D]`, in blocks of rows."""
        if not len(self.keys):
            return torch.zeros_like(x)
        parts = x.split(self.block(len(self.keys), block))
        return torch.cat([self.inner(rows, self.keys, self.bias) @ self.values for rows in parts])

    @staticmethod
    def block(neurons: int, rows: int) -> int:
        """Rows at once, `rows` at most: 2^23 pairs of a row and a neuron, 32 MiB in fp32."""
        return max(64, min(rows, 2**23 // max(neurons, 1)))
