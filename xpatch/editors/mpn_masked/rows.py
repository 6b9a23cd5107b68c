"""Cached rows as the keys see them: each scaled by the mask of its text's language."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import torch

from xpatch.editors.cache import FeatureCache
from xpatch.editors.progress import Report
from xpatch.editors.task import Task, Wording
from xpatch.patches.requests import Probe


class Spoken(Probe):
    """A text that knows its language."""

    language: str

    @staticmethod
    def of(probe: Probe, language: str) -> Spoken:
        return Spoken(text=probe.text, text_pair=probe.text_pair, target=probe.target, language=language)


def spoken(task: Task) -> Task:
    """The same task with `Spoken` texts."""
    edits = [
        dataclasses.replace(
            edit,
            versions=tuple(_spoken(wording) for wording in edit.versions),
            rephrases=tuple(_spoken(wording) for wording in edit.rephrases),
            negatives=tuple(
                Spoken.of(probe, language)
                for language in edit.languages
                for probe in edit.request.versions[language].locality
            ),
        )
        for edit in task.edits
    ]
    memory = {language: [Spoken.of(probe, language) for probe in found] for language, found in task.memory.items()}
    return dataclasses.replace(task, edits=edits, memory=memory)


def _spoken(wording: Wording) -> Wording:
    return Wording(Spoken.of(wording.probe, wording.language), wording.label, wording.language)


class MaskedRows(FeatureCache):
    """A `FeatureCache` whose rows are those of another, one row a text and language; `x` is `x ⊙ inner[language]`.

    inner `[L, D]`, one row per language of `languages`; a text in any other language is taken as it is.
    """

    def __init__(self, plain: FeatureCache, languages: Sequence[str]) -> None:
        self._plain = plain
        self._code = {language: number for number, language in enumerate(languages)}
        self._known: dict[tuple[int, int], int] = {}
        self._masked: torch.Tensor | None = None
        self.inner: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._known)

    def want(self, probes: Iterable[Probe], limit: int | None = None) -> list[int]:
        """Row numbers of (the first `limit` of) probes; those that are not `Spoken` are of no language."""
        asked = list(itertools.islice(probes, limit))
        codes = [self._code.get(getattr(probe, "language", ""), len(self._code)) for probe in asked]
        return [
            self._known.setdefault(pair, len(self._known)) for pair in zip(self._plain.want(asked), codes, strict=True)
        ]

    def fill(self, report: Report) -> None:
        """Read every text wanted since the last call."""
        self._plain.fill(report)
        device = self._plain.x.device
        pairs = torch.tensor(list(self._known), dtype=torch.long, device=device).view(-1, 2)
        self._rows_of, self.codes = pairs[:, 0], pairs[:, 1]
        self._masked = None

    def mask(self, inner: torch.Tensor) -> None:
        """Scale the rows from now on: inner `[L, D]`."""
        self.inner, self._masked = inner, None

    @property
    def cut(self) -> set[int]:  # type: ignore[override]
        """Rows whose texts were cut at the model's length limit."""
        return {own for (row, _), own in self._known.items() if row in self._plain.cut}

    @property
    def x(self) -> torch.Tensor:
        """Inputs of the FFN, masked `[M, D]`."""
        if self._masked is None:
            plain = self._plain.x[self._rows_of]
            self._masked = plain if self.inner is None else plain * with_neutral(self.inner)[self.codes]
        return self._masked

    @property
    def residual(self) -> torch.Tensor:
        return self._plain.residual[self._rows_of]

    @property
    def base(self) -> torch.Tensor:
        return self._plain.base[self._rows_of]

    @property
    def logits(self) -> torch.Tensor:
        return self._plain.logits[self._rows_of]


def with_neutral(inner: torch.Tensor) -> torch.Tensor:
    """inner `[L, D]` and a last row of ones, for languages without a mask."""
    return torch.cat((inner, torch.ones_like(inner[:1])))
