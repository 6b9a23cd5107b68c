"""What is evaluated: a classifier, which answers with a label, or a language model, which answers with what greedy decoding says.

Either way an answer is a number, the place of a text in `labels`: measures compare numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xpatch.errors import MismatchError
from xpatch.evaluation.predict import evaluating, label_index, label_names, predict_indices, spoken
from xpatch.evaluation.questions import Question
from xpatch.models.lm_decoding import Greedy
from xpatch.models.lm_heads import Kind, lm_kind
from xpatch.models.lm_prompts import Prompts
from xpatch.patches.requests import Probe

TOKENS = 16  # of what is said to a text without a target


class Classifier:
    """Answers with one of its labels."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label_names(self._model))

    def gold(self, target: str, probe: Probe, language: str, where: str) -> int:
        """The right answer's number. Raises `MismatchError` for no label of the model."""
        return label_index(self._model, target, where=where)

    def ask(self, questions: Sequence[Question], batch_size: int, languages: Sequence[str] | None = None) -> np.ndarray:
        """The answers `[len(questions)]`. languages: one a question, for patches with language masks."""
        probes = [question.probe for question in questions]
        return predict_indices(self._model, self._tokenizer, probes, batch_size=batch_size, languages=languages)

    def recall(self, labels: Sequence[str], answers: Sequence[int]) -> list[int]:
        """The answers of an earlier report, which has numbered `labels`."""
        return list(answers)


@dataclass(frozen=True)
class _Asked:
    probe: Probe
    target: str | None
    language: str


class Speaker:
    """A language model. It is right where greedy decoding says the target: the first tokens are the target's, or the same text but for
    case. What it says to a text without a target (`TOKENS` tokens; a masked model: at its masks, or everywhere) is compared as text."""

    def __init__(self, model: Any, tokenizer: Any, kind: Kind) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._prompts = Prompts(model, tokenizer, kind)
        self._known: dict[str, int] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """Every target and answer so far."""
        return tuple(self._known)

    def gold(self, target: str, probe: Probe, language: str, where: str) -> int:
        """The target's number. Raises `MismatchError` for a target that cannot be said to `probe`."""
        try:
            self._prompts.said(probe, target, language)
        except MismatchError as error:
            raise MismatchError(f"{where}: {error}") from None
        return self._number(target)

    def ask(self, questions: Sequence[Question], batch_size: int, languages: Sequence[str] | None = None) -> np.ndarray:
        """As `Classifier.ask`."""
        names = self.labels
        asked = [_Asked(q.probe, None if q.gold < 0 else names[q.gold], q.language) for q in questions]
        greedy = Greedy(self._model, self._tokenizer, None, self._prompts, batch_size)
        with evaluating(self._model), torch.no_grad():
            if languages is None:
                said = greedy.says(asked, TOKENS)
            else:  # one by one: texts of equal length go together, whatever language they are in
                said = []
                for one, language in zip(asked, languages, strict=True):
                    with spoken([language]):
                        said += greedy.says([one], TOKENS)
        found = [q.gold if right else self._number(text) for q, (text, right) in zip(questions, said, strict=True)]
        return np.array(found, dtype=np.int64)

    def recall(self, labels: Sequence[str], answers: Sequence[int]) -> list[int]:
        """As `Classifier.recall`."""
        return [self._number(labels[answer]) for answer in answers]

    def _number(self, text: str) -> int:
        return self._known.setdefault(text.strip(), len(self._known))


def subject_of(model: Any, tokenizer: Any) -> Classifier | Speaker:
    """The subject that `model` is. Raises `MismatchError` for a language model that cannot be asked (see `Prompts`)."""
    kind = lm_kind(model)
    return Classifier(model, tokenizer) if kind is None else Speaker(model, tokenizer, kind)
