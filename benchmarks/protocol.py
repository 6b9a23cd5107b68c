"""What the cross-lingual benchmark asks: the bundled verifier's edit set, and claims about other subjects."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xpatch import EditRequest
from xpatch.zoo.verifier import data

# "The capital of X is Y" and "Y is the capital of X" are one fact under two subjects, perhaps in two splits.
INVERSE = {"P36": "P1376", "P1376": "P36"}
# Template 0 is the edited wording, 1 is open to training, 2 and 3 are never trained on; memory holds templates 0 and 1.
TRAINED, UNSEEN = (1,), (2, 3)
# Wordings of locality claims: no memory holds them. Memory knows nothing of test subjects, so they may use one more.
LOCALITY = {"train": UNSEEN, "test": (1, *UNSEEN)}


@dataclass(frozen=True)
class Protocol:
    """Requests to train, the same claims as cases with unseen paraphrases, and claims about subjects that are never edited.

    locality_train (subjects the classifier was trained on) and locality_test (subjects it never saw): language -> probes with
    gold labels, the same claims at the same position in every language; groups: "train" / "test" -> subject of each position.
    """

    requests: Sequence[EditRequest]
    cases: Sequence[EditRequest]
    locality_train: Mapping[str, Sequence]
    locality_test: Mapping[str, Sequence]
    groups: Mapping[str, Sequence[str]]
    edit_rules: Sequence[str] = (
        "The edit set is one claim for each subject of the verifier's split 'edit'; the classifier never saw these subjects. Facts "
        "that are stated the other way round about another subject (capitals) are left out.",
    )

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(language for case in self.cases for language in case.versions))

    @property
    def digest(self) -> str:
        """SHA-256 over every text and label."""
        rows = [
            [request.model_dump() for request in (*self.requests, *self.cases)],
            [
                {language: [probe.model_dump() for probe in probes] for language, probes in part.items()}
                for part in (self.locality_train, self.locality_test)
            ],
            {kind: list(names) for kind, names in self.groups.items()},
        ]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict:
        """Sizes and rules, for the result file."""
        return {
            "edit_set": len(self.cases),
            "languages": list(self.languages),
            "locality_train": {language: len(probes) for language, probes in self.locality_train.items()},
            "locality_test": {language: len(probes) for language, probes in self.locality_test.items()},
            "digest": self.digest,
            "rules": [
                *self.edit_rules,
                "Which claims need an edit is decided by each method's own rule; the measures are taken after all edits are in place.",
                "clg (MPN eq. 12) is measured on the parallel texts of the edits, the very texts MPN (all) is trained on.",
                "clg_unseen is measured on paraphrases (templates 2 and 3) no editor trains on and no memory holds.",
                "clg_needed and clg_unseen are over each method's own needed edits; clg_needed_any and clg_unseen_any are over the "
                "claims the unpatched model gets wrong in any language, the same for every method.",
                "Locality claims are about other subjects, in texts that no memory holds. As in the paper, "
                "locality_train and locality_test are accuracies in English; unchanged is over both kinds, per language.",
            ],
        }


def bundled(edits: int | None = None, locality: int | None = None, split: str = "edit") -> Protocol:
    """The verifier's own edit set, or a seeded choice of `edits` claims and `locality` claims of each kind and language.

    Claims whose fact is stated the other way round about another subject are left out: they would be edited, or kept, twice.
    """
    items = [item for item in data.one_claim_per_subject(split) if stated_once(item.fact)]
    return assemble(
        [items[i] for i in choose(len(items), edits)], locality, also_apart=data.one_claim_per_subject(split)
    )


def stated_once(fact: data.Fact) -> bool:
    """Whether no other subject has a fact that is this one the other way round."""
    return (INVERSE.get(fact.relation), fact.object, fact.subject) not in _known()


def assemble(
    items: Sequence[data.Claim],
    locality: int | None,
    edit_rules: Sequence[str] | None = None,
    also_apart: Sequence[data.Claim] = (),
) -> Protocol:
    """A protocol that edits `items`, with `locality` claims of each kind and language in other texts than theirs."""
    edited = {text for item in (*items, *also_apart) for texts in item.texts.values() for text in texts}
    parts, groups = {}, {}
    for kind, wordings in LOCALITY.items():
        subjects = [item.fact.subject for _ in wordings for item in data.claims(kind)]
        probes = data.locality(kind, templates=wordings)
        # Two subjects may share a label in one language; such a claim would be edited and kept at once.
        apart = [i for i in range(len(subjects)) if not any(found[i].text in edited for found in probes.values())]
        kept = [apart[i] for i in choose(len(apart), locality)]
        parts[kind] = {language: [probes[language][i] for i in kept] for language in probes}
        groups[kind] = [subjects[i] for i in kept]
    made = [[data.request(item, wordings) for item in items] for wordings in (TRAINED, UNSEEN)]
    more = {} if edit_rules is None else {"edit_rules": tuple(edit_rules)}
    return Protocol(made[0], made[1], parts["train"], parts["test"], groups, **more)


@functools.cache
def _known() -> frozenset[tuple[str, str, str]]:
    return frozenset((fact.relation, fact.subject, fact.object) for fact in data.facts())


def choose(size: int, limit: int | None) -> list[int]:
    """Positions of a seeded choice, in order; all of them where there is no limit."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(random.Random(0).sample(range(size), limit))
