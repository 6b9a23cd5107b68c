"""The final FFN as two trainable matrices on cached rows, and one edit's training."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from xpatch.editors.ft.config import FineTuneConfig
from xpatch.editors.t_patcher.train import ACTIVATE
from xpatch.models.anatomy import FFNSite


class TrainableFFN:
    """A copy of the FFN's linears: `weights` are up `[F, D]`, its bias `[F]`, down `[D, F]`, its bias `[D]` (None where there is none)."""

    def __init__(self, model: torch.nn.Module, site: FFNSite) -> None:
        self.act = ACTIVATE[site.activation]
        self.start: list[torch.Tensor | None] = []
        for name in (site.up, site.down):
            linear: Any = model.get_submodule(name)
            weight = linear.weight.detach()
            weight = weight.T if type(linear).__name__ == "Conv1D" else weight
            self.start += [weight.contiguous(), None if linear.bias is None else linear.bias.detach()]
        self.weights = [None if value is None else value.clone().requires_grad_(True) for value in self.start]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[M, D]` -> `[M, D]`."""
        return self._forward(x, self.weights)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """The same with the model's own weights."""
        with torch.no_grad():
            return self._forward(x, self.start)

    @torch.no_grad()
    def added(self, x: torch.Tensor) -> torch.Tensor:
        """What training has changed of the output: x `[M, D]` -> `[M, D]`."""
        return self(x) - self.before(x)

    def replace(self, number: int, delta: torch.Tensor) -> None:
        """Make weight `number` the model's own plus `delta`."""
        start = self.start[number]
        assert start is not None
        self.weights[number] = (start + delta.to(start)).requires_grad_(True)

    def deltas(self) -> list[torch.Tensor | None]:
        """What training added to each of `weights`, on the CPU."""
        return [
            None if w is None or s is None else (w.detach() - s).cpu()
            for w, s in zip(self.weights, self.start, strict=True)
        ]

    def _forward(self, x: torch.Tensor, weights: list[torch.Tensor | None]) -> torch.Tensor:
        up, up_bias, down, down_bias = weights
        assert up is not None and down is not None  # every linear has a weight; only biases may be missing
        return F.linear(self.act(F.linear(x, up, up_bias)), down, down_bias)


class Objective:
    """Cross entropy on an edit's row, and KL from the answers before editing on memory rows.

    A row's `offset` is what the model's FFN output holds beside its linears (patches already applied).
    """

    def __init__(self, ffn: TrainableFFN, cache: Any, tail: Any, memory: torch.Tensor, config: FineTuneConfig) -> None:
        self._ffn, self._cache, self._tail, self._memory, self._config = ffn, cache, tail, memory, config
        self._offset = torch.cat(
            [base - ffn.before(x) for x, base in zip(cache.x.split(4096), cache.base.split(4096), strict=True)]
        )

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The answer of the trained FFN for cached rows `[M, C]`."""
        return self._tail(self._ffn(self._cache.x[rows]) + self._offset[rows], self._cache.residual[rows])

    def fit(self, rows: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> bool:
        """Train until `rows` get `labels`, with a fresh optimiser; whether they do in the end."""
        config = self._config
        weights = self._ffn.weights if config.rank is None else self._ffn.weights[::2]  # no biases
        parameters = [w for w in weights if w is not None]
        kind = torch.optim.Adam if config.optimiser == "adam" else torch.optim.RMSprop
        optimiser = kind(parameters, lr=config.learning_rate)
        for _ in range(config.steps):
            logits = self.logits(rows)
            if bool((logits.argmax(-1) == labels).all()):
                return True
            loss = F.cross_entropy(logits, labels)
            if config.memory_weight and len(self._memory):
                drawn = torch.randint(len(self._memory), (config.memory_per_step,), generator=generator)
                drawn = self._memory[drawn.to(self._memory.device)]
                after = F.log_softmax(self.logits(drawn), -1)
                loss = loss + config.memory_weight * F.kl_div(
                    after, F.log_softmax(self._cache.answers(drawn), -1), log_target=True, reduction="batchmean"
                )
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            if config.clip:
                torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimiser.step()
        with torch.no_grad():
            return bool((self.logits(rows).argmax(-1) == labels).all())
