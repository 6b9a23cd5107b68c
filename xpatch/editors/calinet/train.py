"""The slots as one problem over all facts, on cached rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from xpatch.editors.calinet.config import CaliNetConfig
from xpatch.editors.t_patcher.train import ACTIVATE
from xpatch.editors.task import Task


class Slots:
    """keys `[N, D]`, bias `[N]`, values `[N, D]` beside the FFN: `y + act(x Kᵀ + b) V` (equation 6 of the paper, written as a sum)."""

    def __init__(self, task: Task, config: CaliNetConfig, activation: str) -> None:
        self._cache, self._tail, self._act, self._config = task.cache, task.head.tail, ACTIVATE[activation], config
        width, generator = task.cache.x.shape[1], task.generator("slots")

        def uniform(*shape: int, bound: float) -> torch.Tensor:
            return ((torch.rand(shape, generator=generator) * 2 - 1) * bound).to(task.cache.x)

        self.keys = uniform(config.slots, width, bound=width**-0.5)
        self.values = uniform(config.slots, width, bound=0.0 if config.silent else config.slots**-0.5)
        self.bias = self.keys.new_zeros(config.slots)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers `[M]` of the cache -> `[M, C]`."""
        return self._tail(self._cache.base[rows] + self.added(self._cache.x[rows]), self._cache.residual[rows])

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """What the slots add to the FFN's output: x `[M, D]` -> `[M, D]`."""
        return self._act(F.linear(x, self.keys, self.bias)) @ self.values

    def fit(
        self,
        rows: torch.Tensor,
        labels: torch.Tensor,
        memory: torch.Tensor,
        generator: torch.Generator,
        tick: Callable[[float], None],
    ) -> None:
        """Train all slots until `rows` `[M]` get `labels` `[M]` and `memory` keeps its answers. `tick` hears the share done."""
        config = self._config
        parameters = [self.keys, self.values] + ([self.bias] if config.bias else [])
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate)
        for step in range(config.steps):
            decay = 1 - (1 - config.learning_rate_end) * step / max(config.steps - 1, 1)
            optimiser.param_groups[0]["lr"] = config.learning_rate * decay
            here = _draw(len(rows), config.batch, generator).to(rows.device)
            loss = F.cross_entropy(self.logits(rows[here]), labels[here])
            if config.memory_weight and len(memory):
                drawn = memory[_draw(len(memory), config.memory_per_step, generator).to(memory.device)]
                after = F.log_softmax(self.logits(drawn), -1)
                loss = loss + config.memory_weight * F.kl_div(
                    after, F.log_softmax(self._cache.answers(drawn), -1), log_target=True, reduction="batchmean"
                )
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimiser.step()
            tick((step + 1) / config.steps)
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _draw(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.arange(size) if count >= size else torch.randint(size, (count,), generator=generator)
