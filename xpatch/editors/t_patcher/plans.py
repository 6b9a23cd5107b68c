"""What an edit is trained on, as rows of the cache, and which of its rows get neurons of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xpatch.editors.task import Edit, Wording


@dataclass(frozen=True)
class Plan:
    """One edit's cached rows: `rows[i]` must become `labels[i]`; the first `required` of them decide.

    chosen: the wordings that decide; texts[i]: which of them row i belongs to (those behind them are rephrases).
    """

    edit: Edit
    chosen: tuple[Wording, ...]
    rows: tuple[int, ...]
    labels: tuple[int, ...]
    texts: tuple[int, ...]
    required: int
    negatives: tuple[int, ...]

    def wrong_languages(self, answers: Sequence[int]) -> list[str]:
        """Languages whose text gets another answer than asked for. answers: of the required rows."""
        wrong = {text for text, answer, label in zip(self.texts, answers, self.labels, strict=False) if answer != label}
        return [self.chosen[text].language for text in sorted(wrong)]


@dataclass(frozen=True)
class Slots:
    """Where a language model's edit gets neurons: `anchors[s]` is the row (its place in the plan) slot s is made from; `of[i]` is the slot
    that must fire at row i, None where none must."""

    anchors: tuple[int, ...]
    of: tuple[int | None, ...]


def slots_of(plan: Plan, answers: Sequence[int], most: int) -> Slots:
    """One slot per token that teacher forcing gets wrong, `most` in one text (Transformer-Patcher, section 5: at most 5).

    For further texts (MPN's languages, rephrases) a wrong token that some slot already puts right shares that slot: the same token
    is to be said, so one neuron can serve all languages. The first text's tokens never share.
    """
    anchors: list[int] = []
    by_label: dict[int, int] = {}
    of: list[int | None] = [None] * len(plan.rows)
    counts: dict[int, int] = {}
    for row, (text, label) in enumerate(zip(plan.texts, plan.labels, strict=True)):
        known = by_label.get(label) if text else None
        if row >= plan.required:
            of[row] = by_label.get(label)
        elif answers[row] != label and known is not None:
            of[row] = known
        elif answers[row] != label and counts.get(text, 0) < most:
            counts[text] = counts.get(text, 0) + 1
            of[row] = len(anchors)
            by_label.setdefault(label, len(anchors))
            anchors.append(row)
    if not anchors:  # right by now, beside patches that may change again
        anchors, of[0] = [0], 0
    return Slots(tuple(anchors), tuple(of))
