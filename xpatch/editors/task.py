"""What an editor gets and gives back: resolved edits with label indices, the memory, and the outcome of every request."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from xpatch.editors.cache import FeatureCache
from xpatch.editors.journal import Journal
from xpatch.editors.progress import Report
from xpatch.patches.requests import EditRequest, Probe
from xpatch.patches.types import EditStatus, Gate, LanguageMask, Part


@dataclass(frozen=True)
class Wording:
    """One text an edit is about, its label index and its language. target: what a language model should say to it (label is -1)."""

    probe: Probe
    label: int
    language: str
    target: str | None = None


@dataclass(frozen=True)
class Edit:
    """One request, resolved against a model. `versions[0]` is the request's own language; `negatives` must stay as they are."""

    request: EditRequest
    versions: tuple[Wording, ...]
    rephrases: tuple[Wording, ...]
    negatives: tuple[Probe, ...]

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(version.language for version in self.versions)


class Decoding(Protocol):
    """Asks a language model as it will be asked."""

    def instead(
        self, wordings: Sequence[Wording], added: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> list[str | None]:
        """What the model says to each instead of its target, None where it says that; `added`: see `decoding.Added`."""


@dataclass(frozen=True)
class Task:
    """Everything an editor works on. `memory`: language -> probes whose behaviour must not change.

    head: of `models.heads`, or of `models.lm_heads` for a language model; cache: its rows; decoding: says what the model says with
    trained neurons in place, None for a classifier. journal: what editors that can go on after an interruption train through.
    """

    model: torch.nn.Module
    site: Any
    head: Any
    edits: Sequence[Edit]
    memory: Mapping[str, Sequence[Probe]]
    cache: FeatureCache
    seed: int
    report: Report
    decoding: Decoding | None = None
    tokenizer: Any = None
    journal: Journal = field(default_factory=Journal)

    def rng(self, *salt: str) -> random.Random:
        """A random stream of its own for one purpose: the same whatever else is edited in the call."""
        return random.Random(":".join((str(self.seed), *salt)))

    def generator(self, *salt: str) -> torch.Generator:
        """The same as `rng`, for tensors."""
        return torch.Generator().manual_seed(self.rng(*salt).getrandbits(62))


@dataclass(frozen=True)
class Outcome:
    """What became of one request. `rows`: part name -> rows it owns."""

    status: EditStatus
    message: str
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    group: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Product:
    """An editor's result: parts by name, one outcome per edit, in order, and the language masks and gates that parts name."""

    parts: Mapping[str, Part]
    outcomes: Sequence[Outcome]
    masks: Mapping[str, LanguageMask] = field(default_factory=dict)
    gates: Mapping[str, Gate] = field(default_factory=dict)
