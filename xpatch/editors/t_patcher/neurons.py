"""The patch neurons trained so far, by owner, and what they add to a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xpatch.editors.t_patcher.train import ACTIVATE


@dataclass
class Neurons:
    """keys `[N, D]`, bias `[N]`, values `[N, D]`, owner `[N]`: the number of the edit that owns each neuron."""

    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    owner: torch.Tensor
    activation: str

    @staticmethod
    def none(width: int, activation: str, device: torch.device) -> Neurons:
        empty = torch.zeros(0, width, device=device)
        return Neurons(
            empty, empty[:, 0].clone(), empty.clone(), torch.zeros(0, dtype=torch.long, device=device), activation
        )

    def add(self, owners: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> None:
        """Append the neurons of edits `owners` `[E]`: keys `[E, P, D]`, bias `[E, P]`, values `[E, P, D]`."""
        self.keys = torch.cat((self.keys, keys.flatten(0, 1)))
        self.bias = torch.cat((self.bias, bias.flatten()))
        self.values = torch.cat((self.values, values.flatten(0, 1)))
        self.owner = torch.cat((self.owner, owners.repeat_interleave(keys.shape[1])))

    def drop(self, owners: torch.Tensor) -> None:
        """Forget the neurons of edits `owners`."""
        keep = ~torch.isin(self.owner, owners)
        self.keys, self.bias, self.values, self.owner = (
            v[keep] for v in (self.keys, self.bias, self.values, self.owner)
        )

    def sort(self) -> None:
        """Order by owner, so that each edit's rows lie together."""
        order = torch.argsort(self.owner, stable=True)
        self.keys, self.bias, self.values, self.owner = (
            v[order] for v in (self.keys, self.bias, self.values, self.owner)
        )

    def output(self, x: torch.Tensor, block: int = 4096) -> torch.Tensor:
        """`act(x Kᵀ + b) V` for x `[M, D]`, in blocks of rows."""
        if not len(self.keys):
            return torch.zeros_like(x)
        act = ACTIVATE[self.activation]
        return torch.cat([act(torch.addmm(self.bias, rows, self.keys.T)) @ self.values for rows in x.split(block)])
