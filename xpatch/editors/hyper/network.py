"""What a hyper-network is to the training and to the editor: signals of E edits in, factors of E edits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from xpatch.editors.hyper.capture import Signals
from xpatch.editors.hyper.lowrank import Factors


@dataclass(frozen=True, eq=False)
class Condition:
    """What is known of E edits beside their gradients.

    tokens: input_ids and attention_mask `[E, T]` of the conditioning text. languages: of each edit input. generator: of the noise a
    network draws while training.
    """

    tokens: Mapping[str, torch.Tensor]
    languages: Sequence[str]
    generator: torch.Generator | None = None


class HyperNetwork(torch.nn.Module):
    """A trained editor. `rates`: parameter group -> the parameters that have a learning rate of their own."""

    def forward(self, signals: Mapping[str, Signals], condition: Condition) -> dict[str, Factors]:
        """Linear name -> factors."""
        raise NotImplementedError

    def group_of(self, name: str) -> str:
        """ "main", "step" (MEND's alphas) or "mask": which learning rate the parameter `name` has."""
        return "main"

    def penalty(self, condition: Condition) -> torch.Tensor | None:
        """L0 of the language masks used, None without masks."""
        return None

    def constrain(self) -> None:
        """Put parameters back into their range; called before every step."""


@dataclass(frozen=True)
class Blueprint:
    """All that decides a network's shape. vocabulary: size and width of the base's input embeddings `[V, D]`."""

    linears: Sequence[Any]
    languages: tuple[str, ...]
    embeddings: torch.Tensor | None
    settings: Any
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


class Build(Protocol):
    """Makes a method's network; the random state is that of the blueprint's seed."""

    def __call__(self, plan: Blueprint) -> HyperNetwork:
        """A fresh network."""
