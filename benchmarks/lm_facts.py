"""Questions about the bundled facts for language models: a sentence with its object left out, and the object as the answer.

One fact a subject. Edits ask for another object of the same relation, in every language by its own name: one edit has six targets.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from xpatch import EditRequest, FormatError, Version
from xpatch.patches.requests import Probe
from xpatch.zoo.verifier import data

from .protocol import INVERSE, LOCALITY, TRAINED, UNSEEN, Protocol

BLANK = "___"
# split of the bundled facts -> how many of its facts a base is taught. Edits of "validation" choose settings, those of "edit" are reported.
TAUGHT = {"train": 240, "validation": 60, "edit": 150, "test": 90}


@dataclass(frozen=True)
class Split:
    """Which facts are edited, and which others must stay."""

    edits: str
    locality_test: str


SPLITS = {"validation": Split("validation", "train"), "test": Split("edit", "test")}


@functools.cache
def taught(split: str) -> tuple[data.Fact, ...]:
    """The facts of a split that bases are taught: one a subject, none that another states the other way round."""
    seen: set[str] = set()
    stated: set[tuple[str, str, str]] = set()
    found: list[data.Fact] = []
    for fact in sorted(data.facts(split), key=lambda fact: _order(fact.key)):
        turned = (INVERSE.get(fact.relation, ""), fact.subject, fact.object)
        if fact.subject in seen or turned in stated:
            continue
        seen.add(fact.subject)
        stated.add((fact.relation, fact.object, fact.subject))
        found.append(fact)
    return tuple(found[: TAUGHT[split]])


def question(fact: data.Fact, language: str, template: int) -> str:
    """The sentence with a blank for its object."""
    return data.sentence(fact.relation, language, template, fact.labels[language][0], BLANK)


def lessons() -> list[tuple[str, str, str]]:
    """(language, question, answer) of every fact, wording and language a base is taught."""
    return [
        (language, question(fact, language, template), fact.labels[language][1])
        for split in TAUGHT
        for fact in taught(split)
        for language in data.LANGUAGES
        for template in range(data.TEMPLATES)
    ]


def memory() -> dict[str, list[Probe]]:
    """language -> questions whose answers must stay: the facts of the `train` split, in the wordings open to training."""
    return {
        language: [
            Probe(text=question(fact, language, template), target=fact.labels[language][1])
            for fact in taught("train")
            for template in (0, *TRAINED)
        ]
        for language in data.LANGUAGES
    }


def protocol(split: str, edits: int | None = None, locality: int | None = None) -> Protocol:
    """Edits of one of `SPLITS`, and what must stay. edits: at most so many; locality: at most so many facts of each kind.

    The wordings that paraphrases and locality are measured in are not trained on, nor are they in the memory. Raises `FormatError` for
    a split there is not.
    """
    if split not in SPLITS:
        raise FormatError(f"there is no split {split!r}; splits: {', '.join(SPLITS)}")
    chosen = SPLITS[split]
    facts = taught(chosen.edits)[:edits]

    def probes(facts: Sequence[data.Fact], templates: Sequence[int]) -> dict[str, list[Probe]]:
        return {
            language: [
                Probe(text=question(fact, language, t), target=fact.labels[language][1])
                for t in templates
                for fact in facts
            ]
            for language in data.LANGUAGES
        }

    train, test = taught("train")[:locality], taught(chosen.locality_test)[:locality]
    return Protocol(
        requests=[_request(fact, TRAINED) for fact in facts],
        cases=[_request(fact, UNSEEN) for fact in facts],
        locality_train=probes(train, LOCALITY["train"][:1]),
        locality_test=probes(test, LOCALITY["test"][-1:]),
        groups={"train": [fact.subject for fact in train], "test": [fact.subject for fact in test]},
        edit_rules=("One fact for each subject; its new object is another one of the same relation.",),
    )


def _request(fact: data.Fact, rephrases: Sequence[int]) -> EditRequest:
    wanted = data.wrong_object(fact, random.Random(_order(f"object:{fact.key}")))
    assert wanted is not None, fact.key
    versions = {
        language: Version(
            text=question(fact, language, 0),
            target=wanted[language],
            subject=fact.labels[language][0],
            rephrases=tuple(Probe(text=question(fact, language, t)) for t in rephrases),
        )
        for language in data.LANGUAGES
    }
    return EditRequest(id=fact.key, target=wanted["en"], versions=versions)


def _order(name: str) -> int:
    return int(hashlib.sha1(name.encode()).hexdigest()[:12], 16)
