"""The verifier's facts as sentences and claims: templates filled in, in six languages, true and false."""

from __future__ import annotations

import collections
import functools
import gzip
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from xpatch.patches.requests import EditRequest, Probe, Version
from xpatch.zoo.verifier.facts import FACTS_FILE, LANGUAGES, RELATIONS

LABELS = ("REFUTES", "SUPPORTS")
TEMPLATES = 4  # per relation and language; 0 is the canonical wording


@dataclass(frozen=True)
class Fact:
    """One Wikidata fact with its labels: language -> (subject label, object label)."""

    relation: str
    subject: str
    object: str
    split: str
    labels: dict[str, tuple[str, str]]

    @property
    def key(self) -> str:
        return f"{self.relation}-{self.subject}"


@dataclass(frozen=True)
class Claim:
    """A fact (or a false variant of it) as text. texts: language -> one sentence per template."""

    id: str
    fact: Fact
    label: str
    texts: dict[str, tuple[str, ...]]


@functools.cache
def facts(split: str | None = None) -> tuple[Fact, ...]:
    """All facts, or those of one split ("train", "edit", "validation", "test")."""
    with gzip.open(FACTS_FILE, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = tuple(
        Fact(
            row["relation"],
            row["subject"],
            row["object"],
            row["split"],
            {k: tuple(v) for k, v in row["labels"].items()},
        )
        for row in rows
    )
    return found if split is None else tuple(fact for fact in found if fact.split == split)


@functools.cache
def templates() -> dict[str, dict[str, tuple[str, ...]]]:
    """language -> relation -> its templates."""
    folder = Path(__file__).with_name("templates")
    return {
        language: {
            relation: tuple(patterns)
            for relation, patterns in json.loads((folder / f"{language}.json").read_text(encoding="utf-8")).items()
        }
        for language in LANGUAGES
    }


def sentence(relation: str, language: str, template: int, subject: str, obj: str) -> str:
    """One template with its labels filled in; the first letter is upper case."""
    pattern = templates()[language][relation][template]
    text = pattern.replace("[X]", subject).replace("[Y]", obj)
    if text.endswith(".."):  # a label that ends in a dot ("Apple Inc.")
        text = text[:-1]
    return text[0].upper() + text[1:]


@functools.cache
def alternatives(relation: str) -> tuple[tuple[str, dict[str, str]], ...]:
    """The objects of a relation, once per fact: (object id, language -> label). Drawing from it keeps object frequencies."""
    return tuple(
        (fact.object, {language: fact.labels[language][1] for language in LANGUAGES})
        for fact in facts()
        if fact.relation == relation
    )


def wrong_object(fact: Fact, rng: random.Random) -> dict[str, str] | None:
    """The labels of another object of the same relation, drawn by frequency; None where the relation has just one object."""
    choices = [labels for uri, labels in alternatives(fact.relation) if uri != fact.object and _differs(labels, fact)]
    return rng.choice(choices) if choices else None


def _differs(labels: dict[str, str], fact: Fact) -> bool:
    return all(labels[language].casefold() != fact.labels[language][1].casefold() for language in LANGUAGES)


def claim(fact: Fact, true: bool, salt: str = "") -> Claim | None:
    """The fact as a SUPPORTS claim, or as a REFUTES claim with a wrong object fixed by the fact's id and `salt`."""
    seed = int(hashlib.sha1(f"{fact.key}:{salt}".encode()).hexdigest()[:12], 16)
    objects = (
        {language: fact.labels[language][1] for language in LANGUAGES}
        if true
        else wrong_object(fact, random.Random(seed))
    )
    if objects is None:
        return None
    return Claim(f"{fact.key}-{'true' if true else 'false' + salt}", fact, LABELS[true], _texts(fact, objects))


def _texts(fact: Fact, objects: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """language -> the fact's subject with this object (language -> label), once per template."""
    return {
        language: tuple(
            sentence(fact.relation, language, index, fact.labels[language][0], objects[language])
            for index in range(TEMPLATES)
        )
        for language in LANGUAGES
    }


@functools.cache
def claims(split: str, salt: str = "") -> tuple[Claim, ...]:
    """For every fact of a split, its true claim and one false claim."""
    made = (claim(fact, true, salt) for fact in facts(split) for true in (True, False))
    return tuple(item for item in made if item is not None)


@functools.cache
def every_claim(split: str) -> tuple[Claim, ...]:
    """For every fact of a split, its true claim and one false claim for each other object of its relation."""
    objects: dict[str, dict[str, dict[str, str]]] = collections.defaultdict(dict)
    for fact in facts():
        objects[fact.relation].setdefault(fact.object, {k: labels[1] for k, labels in fact.labels.items()})
    made = []
    for fact in facts(split):
        for uri, labels in objects[fact.relation].items():
            true = uri == fact.object
            if true or _differs(labels, fact):
                made.append(Claim(f"{fact.key}-{'true' if true else uri}", fact, LABELS[true], _texts(fact, labels)))
    return tuple(made)


@functools.cache
def one_claim_per_subject(split: str) -> tuple[Claim, ...]:
    """One claim for each subject of a split: which fact, and whether true or false, is fixed by the subject's id."""
    by_subject: dict[str, list[Claim]] = collections.defaultdict(list)
    for item in claims(split):
        by_subject[item.fact.subject].append(item)
    return tuple(
        options[int(hashlib.sha1(f"one:{subject}".encode()).hexdigest()[:12], 16) % len(options)]
        for subject, options in sorted(by_subject.items())
    )


def requests(split: str = "edit", rephrases: tuple[int, ...] = (1,)) -> list[EditRequest]:
    """One edit request per subject of a split: the canonical wording in six languages, its gold label, chosen paraphrases."""
    return [request(item, rephrases) for item in one_claim_per_subject(split)]


def cases(split: str = "edit", rephrases: tuple[int, ...] = (2, 3)) -> list[EditRequest]:
    """The same claims as `requests`, with the paraphrases no editor is trained on."""
    return requests(split, rephrases)


def memory_texts(limit: int | None = None) -> dict[str, list[str]]:
    """language -> claims of the classification facts in canonical wording and first paraphrase: what edits should leave alone."""
    items = claims("train")
    return {
        language: [item.texts[language][index] for index in (0, 1) for item in items][:limit] for language in LANGUAGES
    }


def locality(split: str, templates: tuple[int, ...] = (2,), limit: int | None = None) -> dict[str, list[Probe]]:
    """language -> claims of a split with their gold labels, to be measured before and after editing."""
    return {
        language: [Probe(text=item.texts[language][i], target=item.label) for i in templates for item in claims(split)][
            :limit
        ]
        for language in LANGUAGES
    }


def request(item: Claim, rephrases: tuple[int, ...] = (1,)) -> EditRequest:
    """A claim as a request: the canonical wording in six languages, its gold label, these templates as paraphrases."""
    return EditRequest(
        id=item.id,
        target=item.label,
        versions={
            language: Version(
                text=texts[0],
                subject=item.fact.labels[language][0],
                rephrases=tuple(Probe(text=texts[index]) for index in rephrases),
            )
            for language, texts in item.texts.items()
        },
    )


__all__ = [
    "LABELS", "LANGUAGES", "RELATIONS", "TEMPLATES", "Claim", "Fact", "cases", "claim", "claims", "every_claim", "facts", "locality",
    "memory_texts", "one_claim_per_subject", "request", "requests", "sentence", "templates",
]  # fmt: skip
