"""What every edit's text is answered with the neurons there are, kept up as neurons come and go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xpatch.editors.cache import FeatureCache
from xpatch.editors.t_patcher.neurons import Neurons
from xpatch.editors.t_patcher.train import Tail

_BLOCK = 4096


class Standing:
    """Which edits are right. Each row's summed patch output is kept; a change of neurons costs what changed, not all there are.

    asked: for each edit, (row of the cache, label) for every text that must be right. Where neurons were taken out, sums carry the
    rounding of what came and went; `refresh` adds up all neurons anew.
    """

    def __init__(
        self, cache: FeatureCache, tail: Tail, neurons: Neurons, asked: Sequence[Sequence[tuple[int, int]]]
    ) -> None:
        self._cache, self._tail, self._neurons = cache, tail, neurons
        device = cache.x.device
        flat = [(row, label, edit) for edit, pairs in enumerate(asked) for row, label in pairs]
        rows, self._labels, self._edits = torch.tensor(flat, dtype=torch.long, device=device).view(-1, 3).unbind(1)
        self._rows, self._place = torch.unique(rows, return_inverse=True)
        self._count = len(asked)
        self.refresh()

    def refresh(self) -> None:
        """Add up all neurons anew."""
        self._neurons.changes.clear()
        self._sums = torch.zeros(len(self._rows), self._cache.x.shape[1], device=self._rows.device)
        self._answers = self._cache.logits[self._rows].argmax(-1)
        if len(self._neurons.keys):
            self._change(1, self._neurons.keys, self._neurons.bias, self._neurons.values)

    def right(self) -> torch.Tensor:
        """Edits whose texts are all answered as asked `[E]`."""
        return self._tally(self._found() != self._labels)

    def wrong(self, edit: int) -> list[int]:
        """Which of an edit's texts, by number, are answered otherwise than asked."""
        mine = self._edits == edit
        return (self._found()[mine] != self._labels[mine]).nonzero().flatten().tolist()

    def _found(self) -> torch.Tensor:
        changes, self._neurons.changes = self._neurons.changes, []
        for change in changes:
            self._change(*change)
        return self._answers[self._place]

    def _tally(self, wrong: torch.Tensor) -> torch.Tensor:
        right = torch.ones(self._count, dtype=torch.bool, device=wrong.device)
        right[self._edits[wrong]] = False
        return right

    @torch.no_grad()
    def _change(self, sign: int, keys: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> None:
        block = self._neurons.block(len(keys), _BLOCK)
        for start in range(0, len(self._rows), block):
            inner = self._neurons.inner(self._cache.x[self._rows[start : start + block]], keys, bias)
            touched = inner.any(1).nonzero().flatten()  # a silent neuron changes nothing
            if not len(touched):
                continue
            where, rows = touched + start, self._rows[touched + start]
            self._sums[where] += sign * (inner[touched] @ values)
            output = self._cache.base[rows] + self._sums[where]
            self._answers[where] = self._tail(output, self._cache.residual[rows]).argmax(-1)
