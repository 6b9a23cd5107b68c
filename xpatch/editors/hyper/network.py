"""What a hyper-network is to the training and to the editor: signals of E edits in, factors of E edits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xpatch.editors.hyper.capture import Signals
from xpatch.editors.hyper.lowrank import Factors
from xpatch.editors.hyper.sites import EditedLinear


@dataclass(frozen=True, eq=False)
class Condition:
    """What is known of E edits beside their gradients.

    tokens: input_ids and attention_mask `[E, T]` of the conditioning text. languages: of each edit input. generator: of the noise a
    network draws while training.
    """

    tokens: Mapping[str, torch.Tensor]
    languages: Sequence[str]
    generator: torch.Generator | None = None


class HyperNetwork(torch.nn.Module, ABC):
    """A network that is trained to edit: signals in, factors out."""

    @abstractmethod
    def forward(self, signals: Mapping[str, Signals], condition: Condition) -> dict[str, Factors]:
        """Linear name -> factors."""

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
    """All that decides a fresh network. languages: of the masks, in the order of their rows; embeddings: the base's input table `[V, D]`
    for a network that reads text; settings: the method's training settings."""

    linears: Sequence[EditedLinear]
    languages: tuple[str, ...]
    embeddings: torch.Tensor | None
    settings: Any
    seed: int = 0
