"""The answers with one down-projection changed, on cached rows or through the model, and one edit's boxed training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from xpatch.editors.ft_l.config import ConstrainedConfig
from xpatch.editors.rows import Answers
from xpatch.editors.t_patcher.train import ACTIVATE
from xpatch.editors.task import Task
from xpatch.models.anatomy import FFNSite
from xpatch.models.readers import every_row
from xpatch.models.surgery import Surgery


class Layer(Protocol):
    """The model as a function of the change `[D_out, D_in]` of one linear's weight."""

    name: str
    delta: torch.Tensor

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers `[M]` of the cache -> `[M, C]`, differentiable in `delta`."""


class FinalLayer:
    """The final FFN's down-projection: its input is computed from cached rows, everything below is never run again."""

    def __init__(self, task: Task) -> None:
        site, self._cache, self._tail = task.site, task.cache, task.head.tail
        self._act = ACTIVATE[site.activation]
        up: Any = task.model.get_submodule(site.up)
        self._weight = up.weight.detach().T if type(up).__name__ == "Conv1D" else up.weight.detach()
        self._bias = up.bias
        self.name = site.down
        self._inner = torch.cat([self._inside(x) for x in task.cache.x.split(4096)])
        self.delta = self._inner.new_zeros(site.width, site.inner)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        output = self._cache.base[rows] + F.linear(self._inner[rows], self.delta)
        return self._tail(output, self._cache.residual[rows])

    @torch.no_grad()
    def added(self, x: torch.Tensor) -> torch.Tensor:
        """What the change adds to the FFN's output: x `[M, D]` -> `[M, D]`."""
        return F.linear(self._inside(x), self.delta)

    def _inside(self, x: torch.Tensor) -> torch.Tensor:
        return self._act(F.linear(x, self._weight, self._bias))


class InnerLayer:
    """Any FFN's down-projection: each answer is a forward of the model, with the change beside the linear layer."""

    def __init__(self, task: Task, site: FFNSite) -> None:
        self._model, self._cache, self.name = task.model, task.cache, site.down
        self.delta = task.cache.x.new_zeros(site.width, site.inner)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        with Surgery() as surgery, every_row():
            surgery.after(
                self._model.get_submodule(self.name), lambda module, args, y: y + F.linear(args[0], self.delta)
            )
            outputs = [self._model(**batch) for batch in self._cache.batches(rows.tolist())]
        return torch.cat([output["logits"] if isinstance(output, Mapping) else output[0] for output in outputs])


class BoxedTraining:
    """Adam on one edit's rows; after each step every weight is within `box` of the base's."""

    def __init__(self, layer: Layer, before: Answers, memory: torch.Tensor, config: ConstrainedConfig) -> None:
        self._layer, self._before, self._memory, self._config = layer, before, memory, config

    def fit(self, rows: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> None:
        """Train `layer.delta`; it stays as it is where the loss is small enough already."""
        config, layer = self._config, self._layer
        layer.delta.requires_grad_(True)
        optimiser = torch.optim.Adam([layer.delta], lr=config.learning_rate)
        for _ in range(config.steps):
            loss = F.cross_entropy(layer.logits(rows), labels)
            if float(loss.detach()) < config.enough:
                break
            if config.memory_weight and len(self._memory):
                drawn = torch.randint(len(self._memory), (config.memory_per_step,), generator=generator)
                drawn = self._memory[drawn.to(self._memory.device)]
                after = F.log_softmax(layer.logits(drawn), -1)
                held = F.kl_div(after, F.log_softmax(self._before(drawn), -1), log_target=True, reduction="batchmean")
                loss = loss + config.memory_weight * held
            (layer.delta.grad,) = torch.autograd.grad(loss, [layer.delta])
            optimiser.step()
            if config.box is not None:
                with torch.no_grad():
                    layer.delta.clamp_(-config.box, config.box)
        layer.delta.requires_grad_(False)
        layer.delta.grad = None
