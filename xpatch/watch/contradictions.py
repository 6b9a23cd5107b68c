"""Edits of one claim that ask for different answers: found on paper, in the requests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xpatch.errors import MismatchError
from xpatch.evaluation.predict import label_index
from xpatch.patches.claims import Asked, asked_by, normalised, same_answer
from xpatch.patches.types import PatchSet

__all__ = ["Claim", "Contradiction", "contradictions", "normalised"]


@dataclass(frozen=True)
class Claim:
    """Who claims something, and the answer asked for."""

    set_name: str
    edit: str
    target: str


@dataclass(frozen=True)
class Contradiction:
    """Two edits of one claim with different targets. text: as the first of them words it."""

    text: str
    text_pair: str | None
    language: str
    first: Claim
    second: Claim


def contradictions(sets: Mapping[str, PatchSet], slot: str, model: Any) -> Iterator[Contradiction]:
    """Every pair with at least one edit of the set called `slot`, which comes first in the pair.

    One claim: the same text (and text pair) in the same language after `normalised`, whether it is the edited text of a version or a
    rephrase of it. Different targets: other labels of `model` (a name and its index are one), for a language model other words.
    Requests that were redacted or rejected claim nothing.
    """
    claims: dict[tuple[str, str, str], list[tuple[Claim, Asked]]] = {}
    for name in sorted(sets, key=lambda name: name != slot):
        for record in sets[name].edits:
            if record.request is not None and record.status != "rejected":
                for asked in asked_by(record.request):
                    claim = Claim(name, record.id, asked.target)
                    claims.setdefault(asked.claim, []).append((claim, asked))
    for (language, *_), made in claims.items():
        told: set[tuple[Claim, Claim]] = set()
        for (first, asked), (second, _) in itertools.combinations(made, 2):
            same = (first.set_name, first.edit) == (second.set_name, second.edit)
            if same or first.set_name != slot or (first, second) in told:
                continue
            if not same_answer(first.target, second.target, lambda target: _index(model, target)):
                told.add((first, second))
                yield Contradiction(asked.probe.text, asked.probe.text_pair, language, first, second)


def _index(model: Any, target: str) -> int | None:
    try:
        return label_index(model, target)
    except MismatchError:  # not the labels of a classifier
        return None
