"""Edits of one claim that ask for different answers: found on paper, in the requests."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xpatch.errors import MismatchError
from xpatch.evaluation.predict import label_index
from xpatch.patches.types import PatchSet


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
    Requests that were redacted claim nothing.
    """
    claims: dict[tuple[str, str, str], list[tuple[Claim, str, str | None]]] = {}
    for name in sorted(sets, key=lambda name: name != slot):
        for record in sets[name].edits:
            for language, version in (record.request.versions if record.request is not None else {}).items():
                shared = record.request.target_of(language) if record.request is not None else None
                for probe in (version.probe, *version.rephrases):
                    target = shared if probe.target is None else probe.target
                    if target is not None:
                        key = (language, normalised(probe.text), normalised(probe.text_pair or ""))
                        claim = Claim(name, record.id, target)
                        claims.setdefault(key, []).append((claim, probe.text, probe.text_pair))
    for (language, *_), made in claims.items():
        told: set[tuple[Claim, Claim]] = set()
        for (first, text, pair), (second, _, _) in itertools.combinations(made, 2):
            same = (first.set_name, first.edit) == (second.set_name, second.edit)
            if same or first.set_name != slot or (first, second) in told:
                continue
            if not _same_answer(first.target, second.target, model):
                told.add((first, second))
                yield Contradiction(text, pair, language, first, second)


def normalised(text: str) -> str:
    """Light normalisation: NFKC, case folded, one space between words, no full stop or other punctuation at the end."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while words and unicodedata.category(words[-1]).startswith(("P", "Z")):
        words = words[:-1]
    return words


def _same_answer(first: str, second: str, model: Any) -> bool:
    if normalised(first) == normalised(second):
        return True
    try:
        return label_index(model, first) == label_index(model, second)
    except MismatchError:  # not the labels of a classifier
        return False
