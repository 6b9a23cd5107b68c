"""What every editor on cached rows needs beside its own training: each edit's rows, the memory's rows, and the words of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from pydantic import Field

from xpatch.editors.heard import SAYS, unsaid
from xpatch.editors.presets import Config
from xpatch.editors.samplers import SAMPLERS, TrainLanguages
from xpatch.editors.task import Edit, Outcome, Task, Wording

LOGITS = 2**25  # at most so many at once: a language model has a vocabulary for each row
Answers = Callable[[torch.Tensor], torch.Tensor]
"""Row numbers `[M]` -> logits `[M, C]`."""


class SampledConfig(Config):
    """Settings the fine-tuning family shares: what is trained on, and what must stay as it is."""

    train_languages: TrainLanguages = "own"
    """Versions that are trained on and decide whether an edit is needed: the request's own language, that and one drawn, or all."""
    rephrases: bool = False
    """Train on the request's rephrases as well; whether an edit is needed or right is decided without them."""
    memory_rows: int = Field(default=40_000, ge=0)
    """Size of the memory, drawn once from the texts given."""
    memory_languages: Literal["trained", "all"] = "trained"
    """Memory texts of the languages trained on only, or of all languages."""
    memory_per_step: int = Field(default=64, ge=0)
    """Memory rows drawn anew for each step."""
    memory_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the answers before editing on memory rows; 0: no memory is read."""


C = TypeVar("C", bound=SampledConfig)


def by_languages(config: C) -> dict[str, C]:
    """The presets "one" and "all": `config` with MPN's samplers."""
    return {choice: config.model_copy(update={"train_languages": choice}) for choice in ("one", "all")}


@dataclass(frozen=True)
class Plan:
    """One edit's cached rows: `rows[i]` must become `labels[i]`; those of `chosen` come first and decide, `sizes[w]` of wording w (a
    language model's target has a row for each token)."""

    edit: Edit
    chosen: tuple[Wording, ...]
    rows: tuple[int, ...]
    labels: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def required(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Trained:
    """An edit that was trained: whether it was right when its training ended, and how long that took."""

    fitted: bool
    seconds: float


class EditRows:
    """The rows of all edits and of the memory, read into the task's cache. `memory` `[M]`: rows no edit trains on."""

    def __init__(self, task: Task, method: str, config: SampledConfig, *, memory: bool) -> None:
        self.task = task
        sampler = SAMPLERS[config.train_languages]
        self.plans = [
            self._plan(edit, sampler(edit, task.rng(method, "languages", edit.request.id)), config.rephrases)
            for edit in task.edits
        ]
        kept = self._memory(config.memory_rows, config.memory_languages == "all") if memory else []
        task.cache.fill(task.report)
        self.device = task.cache.x.device
        self.memory = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.unsaid: dict[int, str] = {}

    @property
    def block(self) -> int:
        """How many rows may be answered at once."""
        return max(
            1, min(4096, LOGITS // (self.task.head.labels if self.task.decoding is None else self.task.head.vocabulary))
        )

    def of(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, labels) `[M]` one edit trains on."""
        plan = self.plans[number]
        return torch.tensor(plan.rows, device=self.device), torch.tensor(plan.labels, device=self.device)

    @torch.no_grad()
    def wrong(self, numbers: Sequence[int], answers: Answers) -> list[list[str]]:
        """For each edit, the languages in which a required text gets another answer than asked for."""
        plans = [self.plans[number] for number in numbers]
        rows = torch.tensor([row for plan in plans for row in plan.rows[: plan.required]], device=self.device)
        parts = rows.long().split(self.block) if len(rows) else ()
        found = iter([answer for part in parts for answer in answers(part).argmax(-1).tolist()])
        wrong: list[list[str]] = []
        for plan in plans:
            labels = iter(plan.labels)
            missed = [[next(found) != next(labels) for _ in range(size)] for size in plan.sizes]
            wrong.append([w.language for w, some in zip(plan.chosen, missed, strict=True) if any(some)])
        return wrong

    def listen(self, wrong: Sequence[Sequence[str]], added: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Ask a language model for what is right by its rows (`wrong`, of all edits); `outcome` fails what it does not say. See `heard`."""
        right = [number for number, found in enumerate(wrong) if not found]
        asked = [(number, wording) for number in right for wording in self.plans[number].chosen]
        self.unsaid = unsaid(self.task.decoding, asked, added)

    def outcome(
        self,
        number: int,
        wrong: Sequence[str],
        trained: Trained | None,
        rows: Mapping[str, tuple[int, ...]] | None = None,
        group: str | None = None,
        because: str = "other edits changed the shared weights",
        note: str = "",
    ) -> Outcome:
        """The ledger's words on one edit. wrong: languages still wrong in the end. `because`: why a right edit may be lost again."""
        plan = self.plans[number]
        rows = rows or {}
        note += " (text cut at the model's length limit)" if self.task.cache.cut.intersection(plan.rows) else ""
        languages, missed = ", ".join(wording.language for wording in plan.chosen), ", ".join(wrong)
        if self.task.decoding is not None:
            languages += SAYS
        if number in self.unsaid:
            message = self.unsaid[number] + note
            return (
                Outcome("failed", message)
                if trained is None
                else Outcome("failed", message, rows, group, trained.seconds)
            )
        if trained is None:
            if not wrong:
                return Outcome(
                    "already-right",
                    f"right in {languages}{note}"
                    if self.task.decoding is not None
                    else f"right in {languages} when its turn came{note}",
                )
            return Outcome("lost", f"was right, but {because}: wrong in {missed}{note}")
        if not wrong:
            return Outcome("edited", f"right in {languages}{note}", rows, group, trained.seconds)
        if trained.fitted:
            message = f"was right, but {because}: wrong in {missed}{note}"
            return Outcome("lost", message, rows, group, trained.seconds)
        return Outcome("failed", f"still wrong in {missed}{note}", rows, group, trained.seconds)

    def _plan(self, edit: Edit, chosen: tuple[Wording, ...], rephrases: bool) -> Plan:
        languages = {wording.language for wording in chosen}
        wordings = [*chosen, *(w for w in edit.rephrases if rephrases and w.language in languages)]
        asked = [self.task.cache.asked(wording) for wording in wordings]
        rows, labels = zip(*(pair for text in asked for pair in text), strict=True)
        return Plan(edit, chosen, rows, labels, tuple(len(text) for text in asked[: len(chosen)]))

    def _memory(self, count: int, everything: bool) -> list[int]:
        languages = {wording.language for plan in self.plans for wording in plan.chosen}
        return memory_rows(self.task, None if everything else languages, count, self.plans)


class OfEdit(Protocol):
    """An edit and the cached rows it is trained on."""

    @property
    def edit(self) -> Edit: ...
    @property
    def rows(self) -> tuple[int, ...]: ...


def memory_rows(task: Task, languages: set[str] | None, count: int, plans: Sequence[OfEdit]) -> list[int]:
    """Rows of the first `count` memory texts in a random order, without what any edit is about: its texts in all languages, rephrases
    included, and the rows it is trained on.

    languages: texts of these alone, where the memory has any of them; None: of all.
    """
    chosen = [name for name in task.memory if languages is not None and name in languages] or task.memory
    probes = [probe for name in chosen for probe in task.memory[name]]
    task.rng("memory").shuffle(probes)
    wordings = [wording.probe for plan in plans for wording in (*plan.edit.versions, *plan.edit.rephrases)]
    known = {(probe.text, probe.text_pair) for probe in wordings}
    kept = [probe for probe in probes if (probe.text, probe.text_pair) not in known]
    edited = {row for plan in plans for row in plan.rows}
    return [row for row in dict.fromkeys(task.cache.want(kept, count)) if row not in edited]
