"""Training many patches side by side: one batched problem on cached rows, no forward of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from xpatch.editors.t_patcher.config import NeuronConfig
from xpatch.editors.t_patcher.losses import activation_loss, memory_loss, task_loss

Tail = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda z: z,
}
_EARLIEST_STOP, _CHECK_EVERY = 125, 25  # the reference's stopping rule


@dataclass
class Problem:
    """`E` edits with `R` rows each (shorter edits repeat their rows in turn), and what must stay silent.

    x, residual, base `[E, R, D]`; labels `[E, R]`; required `[E, R]`: rows that must be right. memory `[M, D]` is shared and may be
    sampled; mates `[M', D]` are rows of other edits and of single edits' locality probes, foreign `[E, M']` is true where a mate must
    stay silent for the edit. crowd `[M'', D]`: rows of earlier edits in random order, foreign to all, of which each step draws `mates_per_step`.
    held `[V, D]`: memory kept for the stopping rule.
    keys, bias, values: initial neurons `[E, P, D]`, `[E, P]`, `[E, P, D]` (`values` before amplification).
    For language models, where each token has a row: weights `[E, R]` of the rows (0 where one is repeated); acting `[E, R, P]`: the neurons
    that must fire at a row; acts `[E, A]`: the rows where some must, repeated in turn. None: rows weigh what `copies` makes of
    them, and each must make some neuron fire.
    """

    x: torch.Tensor
    residual: torch.Tensor
    base: torch.Tensor
    labels: torch.Tensor
    required: torch.Tensor
    memory: torch.Tensor
    held: torch.Tensor
    mates: torch.Tensor
    foreign: torch.Tensor
    crowd: torch.Tensor
    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor | None = None
    acting: torch.Tensor | None = None
    acts: torch.Tensor | None = None

    def narrow(self, keep: torch.Tensor) -> Problem:
        """The problem of some of the edits."""
        shared = ("memory", "held", "mates", "crowd")
        return Problem(
            **{name: value if name in shared or value is None else value[keep] for name, value in vars(self).items()}
        )

    def own(self, z: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The pre-activations `[E, A]` that must be high, of z `[E, R, P]`; rows: each row as often as `copies` makes it stand."""
        if self.acting is None or self.acts is None:
            return z.amax(-1)[:, rows]
        return z.masked_fill(~self.acting, float("-inf")).amax(-1).gather(1, self.acts)


class _Adam:
    """Adam with coupled L2, a learning rate and a gradient norm limit per edit (the first axis of every parameter)."""

    def __init__(self, parameters: list[torch.Tensor], config: NeuronConfig) -> None:
        self._config = config
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]
        self._step = 0

    def step(self, parameters: list[torch.Tensor], gradients: tuple[torch.Tensor, ...], rate: torch.Tensor) -> None:
        self._step += 1
        norm = sum((g.flatten(1).square().sum(1) for g in gradients), torch.zeros_like(rate)).sqrt()
        scale = (self._config.clip / (norm + 1e-6)).clamp(max=1.0)
        for p, g, first, second in zip(parameters, gradients, self._first, self._second, strict=True):
            shape = (-1,) + (1,) * (p.ndim - 1)
            g = (g * scale.view(shape)).add(p, alpha=self._config.weight_decay)
            first.lerp_(g, 1 - 0.9)
            second.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
            denominator = (second / (1 - 0.999**self._step)).sqrt_().add_(1e-8)
            p.sub_(first / denominator * (rate / (1 - 0.9**self._step)).view(shape))

    def narrow(self, keep: torch.Tensor) -> None:
        self._first = [value[keep] for value in self._first]
        self._second = [value[keep] for value in self._second]


def logits_of(
    problem: Problem, tail: Tail, activation: str, keys: torch.Tensor, bias: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits `[E, R, C]` and pre-activations `[E, R, P]` of each edit's rows with its own neurons."""
    edits, rows, _ = problem.x.shape
    z = torch.einsum("erd,epd->erp", problem.x, keys) + bias.unsqueeze(1)
    output = problem.base + torch.einsum("erp,epd->erd", ACTIVATE[activation](z), values)
    return tail(output.flatten(0, 1), problem.residual.flatten(0, 1)).view(edits, rows, -1), z


def right_of(problem: Problem, logits: torch.Tensor) -> torch.Tensor:
    """Edits whose required rows are all right `[E]`."""
    return ((logits.argmax(-1) == problem.labels) | ~problem.required).all(1)


def train(
    problem: Problem,
    config: NeuronConfig,
    tail: Tail,
    activation: str,
    generator: torch.Generator,
    tick: Callable[[float], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The trained neurons: keys `[E, P, D]`, bias `[E, P]`, values `[E, P, D]` (u ⊙ a folded). `tick` hears the share done."""
    rows = torch.arange(max(config.copies, problem.x.shape[1])) % problem.x.shape[1]
    weights = torch.bincount(rows, minlength=problem.x.shape[1]).to(problem.x).expand(problem.x.shape[:2])
    rows = rows.to(problem.x.device)
    parameters = [
        problem.keys.clone(),
        problem.bias.clone(),
        problem.values.clone(),
        torch.full_like(problem.values, config.amplify),
    ]
    adam = _Adam(parameters, config)
    done = [torch.empty_like(problem.keys), torch.empty_like(problem.bias), torch.empty_like(problem.values)]
    alive = torch.arange(len(problem.x), device=problem.x.device)
    total = len(alive)
    rate = torch.full((total,), config.learning_rate, device=problem.x.device)
    watch = _Watch(rate)
    for step in range(config.steps):
        for p in parameters:
            p.requires_grad_(True)
        keys, bias, u, a = parameters
        logits, z = logits_of(problem, tail, activation, keys, bias, u * a)
        own = problem.own(z, rows)
        weigh = weights[: len(alive)] if problem.weights is None else problem.weights
        loss = task_loss(logits, problem.labels, weigh, config.confidence_penalty, config.label_smoothing)
        loss = loss + config.activation_weight * activation_loss(own, config.activation_top)
        drawn = _draw(problem.memory, config.memory_per_step, generator)
        if len(problem.crowd):
            drawn = torch.cat((drawn, _draw(problem.crowd, config.mates_per_step, generator)))
        silent = _others(problem, keys, bias, drawn)
        if silent.shape[1]:
            loss = loss + config.memory_weight * memory_loss(own, silent, config.memory_top, config.memory_margin)
        gradients = torch.autograd.grad(loss.sum(), parameters)
        for p in parameters:
            p.requires_grad_(False)
        decay = 1 - (1 - config.learning_rate_end) * step / max(config.steps - 1, 1)
        adam.step(parameters, gradients, watch.rate * decay)
        if config.early_stop and (step + 1) % _CHECK_EVERY == 0:
            stop = _check(problem, config, tail, activation, parameters, weigh, rows, watch, step + 1)
            if stop.any():
                _store(done, alive[stop], [p[stop] for p in parameters])
                keep = ~stop
                alive, problem, parameters = alive[keep], problem.narrow(keep), [p[keep] for p in parameters]
                adam.narrow(keep)
                watch.narrow(keep)
                if not len(alive):
                    break
        tick(max((step + 1) / config.steps, 1 - len(alive) / total))
    if len(alive):
        _store(done, alive, parameters)
    return done[0], done[1], done[2]


def _store(done: list[torch.Tensor], where: torch.Tensor, parameters: list[torch.Tensor]) -> None:
    keys, bias, u, a = parameters
    for target, value in zip(done, (keys, bias, u * a), strict=True):
        target[where] = value


def _draw(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` rows that follow each other from a drawn one on, round the end: rows are in random order, and lie together in memory."""
    if not count or count >= len(rows):
        return rows
    start = int(torch.randint(len(rows), (1,), generator=generator))
    window = rows[start : start + count]
    return window if len(window) == count else torch.cat((window, rows[: count - len(window)]))


def _others(problem: Problem, keys: torch.Tensor, bias: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Pre-activations `[E, M + M']` of rows that must stay silent, the largest over an edit's neurons; own rows are -inf."""
    edits, neurons, width = keys.shape
    flat, offset = keys.reshape(-1, width), bias.reshape(-1, 1)
    shared = torch.addmm(offset, flat, memory.T)
    mates = torch.addmm(offset, flat, problem.mates.T).view(edits, neurons, -1)
    mates = mates.masked_fill(~problem.foreign.unsqueeze(1), float("-inf"))
    found = torch.cat((shared.view(edits, neurons, -1), mates), dim=2)
    return found.squeeze(1) if neurons == 1 else found.amax(1)


class _Watch:
    """Per edit: what the plateau rule and the stopping rule have seen."""

    def __init__(self, rate: torch.Tensor) -> None:
        self.rate = rate
        self.best_task = torch.full_like(rate, float("inf"))
        self.bad = torch.zeros_like(rate)
        self.best_memory = torch.full_like(rate, float("inf"))

    def narrow(self, keep: torch.Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[keep])


def _check(
    problem: Problem, config: NeuronConfig, tail: Tail, activation: str, parameters: list[torch.Tensor], weights: torch.Tensor,
    rows: torch.Tensor, watch: _Watch, step: int,
) -> torch.Tensor:  # fmt: skip
    """Which edits stop here `[E]`; halves learning rates on a plateau (patience 1, relative threshold 0.05)."""
    keys, bias, u, a = parameters
    logits, z = logits_of(problem, tail, activation, keys, bias, u * a)
    task = task_loss(logits, problem.labels, weights, config.confidence_penalty, config.label_smoothing)
    better = task < watch.best_task - 0.05 * watch.best_task.abs().nan_to_num(posinf=0.0)
    watch.best_task = torch.where(better, task, watch.best_task)
    watch.bad = torch.where(better, 0.0, watch.bad + 1)
    watch.rate = torch.where(watch.bad > 1, watch.rate / 2, watch.rate)
    watch.bad = torch.where(watch.bad > 1, 0.0, watch.bad)
    if step < _EARLIEST_STOP:
        return torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    held = _others(problem, keys, bias, problem.held)
    memory = (
        memory_loss(problem.own(z, rows), held, config.memory_top, config.memory_margin)
        if held.shape[1]
        else torch.zeros_like(task)
    )
    right = right_of(problem, logits)
    stop = right & ~(memory < watch.best_memory - 1e-3)
    watch.best_memory = torch.where(right, torch.minimum(watch.best_memory, memory), watch.best_memory)
    return stop
