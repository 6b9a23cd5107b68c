"""What the editing benchmark edits: claims about the verifier's classification facts that a model gets wrong.

Subjects of the splits "edit" and "test" are not edited: what is reported elsewhere is measured on them. Each claim is another one: a
fact as it is, or with one of its relation's other objects; the target is the gold label. Capitals are left out, which are stated
both ways round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xpatch import EditRequest
from xpatch.evaluation import predict_indices
from xpatch.patches.requests import Probe
from xpatch.zoo.verifier import data

from . import texts
from .protocol import INVERSE, TRAINED, UNSEEN, choose

SPLIT = "train"
_BLOCK = 512  # claims asked at once
_TURNS = 36  # claims of the stream that are looked at, a fact; past 37 the relations have no other objects left


def needed(
    model: Any, tokenizer: Any, count: int, seed: int, languages: Sequence[str] = texts.LANGUAGES,
    report: Callable[[str, int, int], None] | None = None, split: str = SPLIT,
) -> list[data.Claim]:  # fmt: skip
    """The first `count` claims of a seeded order that the model answers wrong in at least one of `languages`; fewer where they end."""
    labels: Mapping[str, int] = model.config.label2id
    facts = len(data.facts(split))
    stream = itertools.islice(texts.claims(seed, split), _TURNS * facts)
    kept = (item for item in stream if item.fact.relation not in INVERSE)
    found: list[data.Claim] = []
    while len(found) < count and (
        block := list(itertools.islice(kept, min(_BLOCK, max(16, 2 * (count - len(found))))))
    ):
        wrong: set[int] = set()
        for language in reversed(
            languages
        ):  # the last are the hardest: what is wrong there need not be asked elsewhere
            asked = [number for number in range(len(block)) if number not in wrong]
            answers = predict_indices(model, tokenizer, [block[number].texts[language][0] for number in asked])
            wrong |= {
                number for number, answer in zip(asked, answers, strict=True) if answer != labels[block[number].label]
            }
        found += [block[number] for number in sorted(wrong)]
        if report is not None:
            report("choosing", min(len(found), count), count)
    return found[:count]


def name(claim: data.Claim) -> list[str]:
    """What a claim is made from again: its fact's relation and subject, and the salt of its wrong object ("" in `true` ones)."""
    mark = claim.id.removeprefix(f"{claim.fact.key}-")
    return [claim.fact.relation, claim.fact.subject, mark]


def recall(names: Sequence[Sequence[str]]) -> list[data.Claim]:
    """Claims by their `name`."""
    facts = {(fact.relation, fact.subject): fact for fact in data.facts()}
    found = (
        data.claim(facts[relation, subject], mark == "true", mark.removeprefix("false"))
        for relation, subject, mark in names
    )
    return [claim for claim in found if claim is not None]


def requests(
    claims: Sequence[data.Claim], languages: Sequence[str], rephrases: Sequence[int] = TRAINED
) -> list[EditRequest]:
    """Claims as edit requests with the wordings `rephrases`."""
    return [texts.request(item, number, languages, rephrases) for number, item in enumerate(claims)]


def cases(claims: Sequence[data.Claim], languages: Sequence[str]) -> list[EditRequest]:
    """The same claims with the paraphrases no editor is trained on."""
    return requests(claims, languages, UNSEEN)


def watched(count: int, languages: Sequence[str]) -> dict[str, list[Probe]]:
    """language -> `count` claims about subjects of the split "test", in wordings no memory holds: what must not change."""
    found = data.locality("test", templates=UNSEEN)
    chosen = choose(len(found[languages[0]]), count)
    return {language: [found[language][index] for index in chosen] for language in languages}
