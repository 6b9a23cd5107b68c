"""What every edit's text is answered with the neurons there are, kept up as neurons come and go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from xpatch.editors.cache import FeatureCache
from xpatch.editors.t_patcher.neurons import Neurons
from xpatch.editors.t_patcher.train import Tail

_BLOCK = 4096


class Standing:
    """Which edits are right. Each row's summed patch output is kept; a change of neurons costs what changed, not all there are.

    asked: for each edit, (row of the cache, label) for every row that must be right: one for each text, in a language model one for each
    token. block: rows the head answers at once. Where neurons were taken out, sums carry the rounding of what came and went; `refresh`
    adds up all neurons anew.
    """

    def __init__(
        self,
        cache: FeatureCache,
        tail: Tail,
        neurons: Neurons,
        asked: Sequence[Sequence[tuple[int, int]]],
        block: int = _BLOCK,
    ) -> None:
        self._cache, self._tail, self._neurons, self._block = cache, tail, neurons, min(block, _BLOCK)
        device = cache.x.device
        flat = [(row, label, edit) for edit, pairs in enumerate(asked) for row, label in pairs]
        rows, self._labels, self._edits = torch.tensor(flat, dtype=torch.long, device=device).view(-1, 3).unbind(1)
        self._rows, self._place = torch.unique(rows, return_inverse=True)
        self._starts = [0, *itertools.accumulate(map(len, asked))]
        self.refresh()

    def refresh(self) -> None:
        """Add up all neurons anew."""
        self._neurons.changes.clear()
        self._sums = torch.zeros(len(self._rows), self._cache.x.shape[1], device=self._rows.device)
        self._answers = torch.zeros_like(self._rows)
        self._stale = torch.ones_like(self._rows, dtype=torch.bool)
        if len(self._neurons.keys):
            self._change(1, self._neurons.keys, self._neurons.bias, self._neurons.values)

    def right(self) -> torch.Tensor:
        """Edits whose rows are all answered as asked `[E]`."""
        self._catch_up()
        right = torch.ones(len(self._starts) - 1, dtype=torch.bool, device=self._rows.device)
        right[self._edits[self._answers[self._place] != self._labels]] = False
        return right

    def answers(self, edit: int) -> list[int]:
        """What is answered at each of an edit's rows."""
        self._catch_up()
        return self._answers[self._place[self._starts[edit] : self._starts[edit + 1]]].tolist()

    @torch.no_grad()
    def _catch_up(self) -> None:
        changes, self._neurons.changes = self._neurons.changes, []
        for change in changes:
            self._change(*change)
        # The head last, once for all changes: a language model's is dear.
        for part in self._stale.nonzero().flatten().split(self._block):
            rows = self._rows[part]
            output = self._cache.base[rows] + self._sums[part]
            self._answers[part] = self._tail(output, self._cache.residual[rows]).argmax(-1)
        self._stale[:] = False

    @torch.no_grad()
    def _change(self, sign: int, keys: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> None:
        block = self._neurons.block(len(keys), _BLOCK)
        for start in range(0, len(self._rows), block):
            inner = self._neurons.inner(self._cache.x[self._rows[start : start + block]], keys, bias)
            touched = inner.any(1).nonzero().flatten()  # a silent neuron changes nothing
            if len(touched):
                self._sums[touched + start] += sign * (inner[touched] @ values)
                self._stale[touched + start] = True
