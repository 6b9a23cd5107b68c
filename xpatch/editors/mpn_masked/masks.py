"""Learning the masks: together with neurons that are thrown away, so that one key fits an edit in every language.

Axes: `E` edits, `R` rows of one edit, `M` memory rows, `L` languages, `D` width. The losses are Transformer-Patcher's; the masks are
shared by all edits, the neurons are not, so what the masks learn is what the languages have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xpatch.editors.mpn_masked.config import MaskedConfig
from xpatch.editors.mpn_masked.rows import MaskedRows, with_neutral
from xpatch.editors.t_patcher.losses import activation_loss, memory_loss, task_loss
from xpatch.editors.t_patcher.train import Problem as Batch
from xpatch.editors.t_patcher.train import Tail, _Adam, _others, logits_of


@dataclass(frozen=True)
class Lesson:
    """Row numbers and labels of the edits, `[E, R]` (shorter edits repeat their rows in turn), and of memory texts `[M]`."""

    rows: torch.Tensor
    labels: torch.Tensor
    memory: torch.Tensor


def learn(
    lesson: Lesson, cache: MaskedRows, learned: Sequence[int], count: int, config: MaskedConfig, tail: Tail, activation: str,
    generator: torch.Generator, tick: Callable[[float], None],
) -> torch.Tensor:  # fmt: skip
    """The masks inner `[count, D]`; languages not in `learned` keep a row of ones.

    cache: unmasked rows. generator: draws values and memory rows.
    """
    x, codes = cache.x, cache.codes
    device, width = x.device, x.shape[1]
    own, memory = lesson.rows, lesson.memory
    mates = own.flatten().unique()
    foreign = ~(own.unsqueeze(1) == mates.view(1, -1, 1)).any(2)
    first = x[own[:, :1]]
    parameters = [
        first / first.square().sum(-1, keepdim=True),
        torch.zeros(len(own), 1, device=device),
        torch.randn(len(own), 1, width, generator=generator).to(x),
        torch.full((len(own), 1, width), config.amplify, device=device),
    ]
    free = torch.zeros(count, 1, device=device)
    free[list(learned)] = 1.0
    change = torch.zeros(count, width, device=device, requires_grad=True)
    neurons, masks = _Adam(parameters, config), torch.optim.Adam([change], lr=config.mask_rate)
    residual, base = cache.residual[own], cache.base[own]
    weights = torch.ones(own.shape, device=device)
    rate = torch.full((len(own),), config.mask_neuron_rate, device=device)
    for step in range(config.mask_steps):
        for p in parameters:
            p.requires_grad_(True)
        keys, bias, u, a = parameters
        scale = with_neutral(1 + change * free)
        drawn = memory
        if 0 < config.memory_per_step < len(memory):
            drawn = memory[torch.randint(len(memory), (config.memory_per_step,), generator=generator).to(device)]
        batch = Batch(
            x=x[own] * scale[codes[own]], residual=residual, base=base, labels=lesson.labels, required=weights.bool(),
            memory=x[drawn] * scale[codes[drawn]], held=x[:0], mates=x[mates] * scale[codes[mates]], foreign=foreign,
            crowd=x[:0], keys=keys, bias=bias, values=u,
        )  # fmt: skip
        logits, z = logits_of(batch, tail, activation, keys, bias, u * a)
        fires = z.amax(-1)
        loss = task_loss(logits, lesson.labels, weights, config.confidence_penalty)
        loss = loss + config.activation_weight * activation_loss(fires, config.activation_top)
        silent = _others(batch, keys, bias, batch.memory)
        if silent.shape[1]:
            loss = loss + config.memory_weight * memory_loss(fires, silent, config.memory_top, config.memory_margin)
        total = loss.sum() + len(own) * config.mask_shrink * change.square().sum()
        *gradients, towards = torch.autograd.grad(total, [*parameters, change])
        for p in parameters:
            p.requires_grad_(False)
        decay = 1 - 0.9 * step / max(config.mask_steps - 1, 1)
        neurons.step(parameters, tuple(gradients), rate * decay)
        change.grad = towards / len(own)
        masks.param_groups[0]["lr"] = config.mask_rate * decay
        masks.step()
        tick((step + 1) / config.mask_steps)
    return (1 + change * free).detach()
