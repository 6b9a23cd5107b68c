"""The answers with a codebook, on cached rows, and the training of one value."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from xpatch.editors.ft.train import TrainableFFN
from xpatch.editors.grace.codebook import Codebook
from xpatch.editors.grace.config import GraceConfig
from xpatch.editors.task import Task


class Adaptor:
    """The final FFN with a codebook. A row that belongs to no key keeps the FFN's output; another gets its value, in place or added."""

    def __init__(self, task: Task, config: GraceConfig) -> None:
        self._cache, self._tail, self._config = task.cache, task.head.tail, config
        self.book = Codebook(task.cache.x.shape[1], task.cache.x.device)
        if config.place == "add":
            self._under = task.cache.base
        else:  # what the FFN's output holds beside its linears: patches the model already carries
            ffn = TrainableFFN(task.model, task.site)
            pairs = zip(task.cache.x.split(4096), task.cache.base.split(4096), strict=True)
            self._under = torch.cat([base - ffn.before(x) for x, base in pairs])

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers `[M]` of the cache -> `[M, C]`."""
        key, here = self.book.look(self._cache.x[rows])
        output = self._cache.base[rows]
        if len(self.book):
            output = torch.where(here[:, None], self._under[rows] + self.book.values[key], output)
        return self._tail(output, self._cache.residual[rows])

    def begin(self, key: int, row: int, generator: torch.Generator) -> None:
        """The first value of a new key, made from `row`."""
        if self._config.start == "cold":
            drawn = torch.rand(self.book.values.shape[1], generator=generator)
            self.book.values[key] = drawn.to(self.book.values)
        else:
            self.book.values[key] = self._cache.base[row] - self._under[row]

    def fit(self, key: int, rows: torch.Tensor) -> None:
        """Train the value of `key` until `rows` `[M]` get its label; nothing else is trained."""
        config = self._config
        value = self.book.values[key].clone().requires_grad_(True)
        labels = torch.full((len(rows),), self.book.labels[key], device=rows.device)
        optimiser = torch.optim.Adam([value], lr=config.learning_rate)
        for _ in range(config.steps):
            logits = self._tail(self._under[rows] + value, self._cache.residual[rows])
            loss = F.cross_entropy(logits, labels)
            if float(loss.detach()) < config.enough:
                break
            (value.grad,) = torch.autograd.grad(loss, [value])
            optimiser.step()
        self.book.values[key] = value.detach()
