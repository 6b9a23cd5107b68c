"""Committed text for benchmarks: claims to edit, memory and held-out sentences, all from the bundled facts and templates.

Claims to edit are about subjects of the split "edit", memory is about those of "train", held-out sentences about those of "test"
(seed 0, what is reported) or "validation" (other seeds, what is tuned on). Two subjects may bear one name: editors leave a text out
of the memory that is edited too, and no held-out sentence is about a subject of
an edit or of the memory, nor about capitals, which are stated both ways round.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence

from xpatch import EditRequest, Version
from xpatch.patches.requests import Probe
from xpatch.zoo.verifier import data

from .protocol import INVERSE

LANGUAGES = data.LANGUAGES


def claims(seed: int, split: str = "edit") -> Iterator[data.Claim]:
    """Claims about one split, without end: every fact true, then with one wrong object after another, in a seeded order."""
    facts = data.facts(split)
    seen: set[tuple[str, ...]] = set()
    for turn in itertools.count():
        order = random.Random(f"claims:{seed}:{turn}").sample(range(len(facts)), len(facts))
        for index in order:
            found = data.claim(facts[index], turn == 0, f"{seed}-{turn}")
            if found is not None and (key := tuple(found.texts[k][0] for k in LANGUAGES)) not in seen:
                seen.add(key)
                yield found


@functools.cache
def _drawn(seed: int) -> tuple[list[data.Claim], Iterator[data.Claim]]:
    return [], claims(seed)


def request(item: data.Claim, number: int, languages: Sequence[str], rephrases: Sequence[int]) -> EditRequest:
    """A claim as an edit with the wordings `rephrases`; `number` makes its id."""
    versions = {
        language: Version(
            text=item.texts[language][0],
            subject=item.fact.labels[language][0],
            rephrases=tuple(Probe(text=item.texts[language][index]) for index in rephrases),
        )
        for language in languages
    }
    return EditRequest(id=f"{number}:{item.id}", target=item.label, versions=versions)


def requests(seed: int, start: int, stop: int, languages: Sequence[str] = LANGUAGES) -> list[EditRequest]:
    """Claims `start` to `stop` as edit requests: the canonical wording in each language, with the gold label."""
    known, more = _drawn(seed)
    known.extend(itertools.islice(more, max(0, stop - len(known))))
    return [
        EditRequest(
            id=f"{number}:{item.id}",
            target=item.label,
            versions={language: Version(text=item.texts[language][0]) for language in languages},
        )
        for number, item in enumerate(known[start:stop], start=start)
    ]


def memory(languages: Sequence[str] = LANGUAGES, per_language: int | None = None) -> dict[str, list[str]]:
    """language -> the bundled claims that edits should leave alone, the first `per_language` of a seeded order."""
    found = data.memory_texts()
    order = list(range(len(found[LANGUAGES[0]])))
    random.Random("memory").shuffle(order)
    return {language: [found[language][index] for index in order[:per_language]] for language in languages}


def labelled(languages: Sequence[str] = LANGUAGES, per_language: int | None = None) -> list[tuple[str, int]]:
    """The memory's texts with their gold labels: what a classifier is trained on."""
    gold = {
        item.texts[language][index]: data.LABELS.index(item.label)
        for item in data.claims("train")
        for language in languages
        for index in (0, 1)
    }
    return [(text, gold[text]) for texts in memory(languages, per_language).values() for text in texts]


def held_out(count: int, seed: int, languages: Sequence[str] = LANGUAGES) -> list[str]:
    """`count` distinct sentences about subjects that no edit and no memory is about, in all wordings, in a seeded order."""
    taken = {
        fact.labels[language][0] for split in ("train", "edit") for fact in data.facts(split) for language in LANGUAGES
    }
    found = sorted(
        {
            text
            for item in data.claims("validation" if seed else "test")
            for language in languages
            if item.fact.labels[language][0] not in taken and item.fact.relation not in INVERSE
            for text in item.texts[language]
        }
    )
    if count > len(found):
        raise ValueError(f"held-out sentences: asked for {count}, there are {len(found)} in {', '.join(languages)}")
    return random.Random(f"held out:{seed}").sample(found, count)
