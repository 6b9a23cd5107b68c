"""The training loop: accumulate, clip, step, validate, keep the best; it goes on exactly where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from xpatch.editors.hyper.config import TrainConfig
from xpatch.editors.hyper.network import HyperNetwork
from xpatch.editors.hyper.objective import Trial
from xpatch.editors.hyper.processes import Processes
from xpatch.editors.hyper.sampling import Draw, Sampler
from xpatch.editors.progress import Report

BETTER = 1e-6


@dataclass
class Progress:
    """How far a training is. best: by the configured key, larger is better; multiplier, margin: of the constrained objective."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    skipped: int = 0
    multiplier: float = 1.0
    margin: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """One network being trained on one sampler's draws."""

    def __init__(
        self,
        trial: Trial,
        network: HyperNetwork,
        sampler: Sampler,
        held: Sequence[Draw],
        config: TrainConfig,
        seed: int,
        processes: Processes,
    ) -> None:
        self.trial, self.network, self.sampler, self.held = trial, network, sampler, list(held)
        self.config, self.seed, self.processes = config, seed, processes
        self.progress = Progress(margin=config.margin)
        groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            groups.setdefault(network.group_of(name), []).append(parameter)
        rates = {
            "main": config.learning_rate,
            "step": getattr(config, "alpha_rate", config.learning_rate),
            "mask": getattr(config, "mask_rate", config.learning_rate),
        }
        self._rates = [rates[group] for group in groups]
        listed: list[dict[str, Any]] = [
            {"params": group, "lr": rate} for group, rate in zip(groups.values(), self._rates, strict=True)
        ]
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(listed) if config.optimiser == "adam" else torch.optim.RMSprop(listed, centered=True)
        )
        self._parameters = [parameter for group in groups.values() for parameter in group]

    def run(self, report: Report, keep: Callable[[bool], None]) -> None:
        """Train to the end. `keep(better)` is called after every validation, and once at the end."""
        config, progress = self.config, self.progress
        while progress.step < config.steps and not self.exhausted:
            self.step()
            report("training", progress.step, config.steps)
            if progress.step % config.validate_every == 0 or progress.step == config.steps:
                keep(self.validate(report))

    @property
    def exhausted(self) -> bool:
        """Whether the validation has not become better for `patience` steps."""
        return self.progress.best is not None and self.progress.step - self.progress.best_step >= self.config.patience

    def step(self) -> dict[str, float]:
        """One optimiser step; a step whose loss or gradient is not finite changes nothing but the count."""
        config, progress = self.config, self.progress
        first = progress.step * config.edits_per_step
        draws = [self.sampler.draw(first + place) for place in range(config.edits_per_step)]
        mine = draws[self.processes.rank :: self.processes.count]
        share = self.processes.count / config.edits_per_step
        self.network.train()
        self.network.constrain()
        self.optimiser.zero_grad(set_to_none=True)
        totals = torch.zeros(2)
        for part in range(config.accumulate):
            chunk = mine[part :: config.accumulate]
            salt = f"{self.seed}:noise:{progress.step}:{self.processes.rank}:{part}"
            generator = torch.Generator().manual_seed(_number(salt))
            answers, condition = self.trial(self.network, chunk, generator)
            nll, kl = answers.nll.sum() * share, answers.kl.sum() * share
            if config.constrained:
                loss = nll + progress.multiplier * (kl - progress.margin * len(chunk) * share)
            else:
                loss = config.edit_weight * nll + config.locality_weight * kl
            penalty = self.network.penalty(condition)
            weight = getattr(config, "l0_weight", 0.0)
            if penalty is not None and weight:
                loss = loss + weight * penalty * len(chunk) * share
            loss.backward()
            totals += torch.stack((nll.detach(), kl.detach())).cpu()
        totals = self.processes.mean(totals)
        gradients = self._gradients()
        norm = torch.linalg.vector_norm(gradients)
        progress.step += 1
        if not (bool(torch.isfinite(norm)) and bool(torch.isfinite(totals).all())):
            progress.skipped += 1
            return {"nll": math.nan, "kl": math.nan}
        self._set(gradients * min(1.0, config.clip / (float(norm) + 1e-6)))
        factor = self._schedule(progress.step)
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimiser.step()
        if config.constrained:
            rise = config.multiplier_rate * (float(totals[1]) - progress.margin)
            progress.multiplier = max(0.0, progress.multiplier + rise)
        return {"nll": float(totals[0]), "kl": float(totals[1])}

    @torch.no_grad()
    def validate(self, report: Report | None = None) -> bool:
        """Measure on the held-out edits and note it; whether it is the best so far."""
        self.network.eval()
        found = measure(self.trial, self.network, self.held, self.config, self.processes, report)
        progress, config = self.progress, self.config
        progress.history.append({"step": float(progress.step), **found})
        key = found["harmonic"] if config.best_by == "harmonic" else -found["loss"]
        better = math.isfinite(key) and (progress.best is None or key > progress.best + BETTER)
        if better:
            progress.best, progress.best_step = key, progress.step
        elif progress.best is None:
            progress.best, progress.best_step = -math.inf, progress.step
        if config.constrained and found["flips_right"] > 0.9:
            progress.margin = max(config.margin_floor, progress.margin * 0.8)
        return better

    def state(self) -> dict[str, torch.Tensor]:
        """The network and the optimiser's moments, by name."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor], progress: Progress) -> None:
        """Go on from `state()`."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                index, _, moment = rest.partition(".")
                moments.setdefault(int(index), {})[moment] = value
        self.network.load_state_dict(
            {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("network.")}
        )
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.progress = progress

    def _gradients(self) -> torch.Tensor:
        flat = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in self._parameters
        ]
        return self.processes.mean(torch.cat(flat))

    def _set(self, flat: torch.Tensor) -> None:
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, flat.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _schedule(self, step: int) -> float:
        config = self.config
        rise = min(1.0, step / config.warmup) if config.warmup else 1.0
        fall = max(0.0, (config.steps - step) / config.steps) if config.decay == "linear" else 1.0
        return rise * fall


@torch.no_grad()
def measure(
    trial: Trial,
    network: HyperNetwork,
    draws: Sequence[Draw],
    config: TrainConfig,
    processes: Processes,
    report: Report | None = None,
    batch: int = 16,
) -> dict[str, float]:
    """Over `draws`, each edit on the base alone: loss, nll, kl; shares right (all, and of those that ask for another label), kept
    (other texts answered as before) and the harmonic mean of right and kept."""
    mine = draws[processes.rank :: processes.count]
    sums = torch.zeros(7, dtype=torch.float64)
    for start in range(0, len(mine), batch):
        answers, _ = trial(network, mine[start : start + batch])
        flips = answers.flips
        sums += torch.stack(
            [
                answers.nll.sum(),
                answers.kl.sum(),
                answers.right.sum(),
                (answers.right & flips).sum(),
                flips.sum(),
                answers.kept.sum(),
                torch.tensor(answers.kept.numel(), device=flips.device),
            ]
        ).detach().double().cpu()  # fmt: skip
        if report is not None:
            report("validating", min(start + batch, len(mine)), len(mine))
    nll, kl, right, flipped, flips_, kept, asked = (processes.mean(sums) * processes.count).tolist()
    count = len(draws)
    found = {"nll": nll / count, "kl": kl / count, "right": right / count, "kept": kept / asked}
    found["flips_right"] = flipped / flips_ if flips_ else math.nan
    found["loss"] = config.edit_weight * found["nll"] + config.locality_weight * found["kl"]
    both = found["right"] + found["kept"]
    found["harmonic"] = 2 * found["right"] * found["kept"] / both if both else 0.0
    return found


def _number(salt: str) -> int:
    import random

    return random.Random(salt).getrandbits(62)
