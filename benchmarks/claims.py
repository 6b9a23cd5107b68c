"""Claims the unpatched model gets wrong in every language: the edit set of MPN's Table 3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xpatch.evaluation import label_names, predict_indices
from xpatch.zoo.verifier import data
from xpatch.zoo.verifier.data import Claim

from . import cache
from .machine import write_json
from .protocol import Protocol, assemble, choose, stated_once

# English first: it leaves the fewest, so that the other languages ask little.
ORDER = ("en", "zh", "ar", "fr", "de", "es")

RULES = [
    "The edit set is one claim for each subject of the verifier's split 'edit' for which there is one that this model gets wrong in every "
    "language (canonical wording): of the true claim and the false claims with every other object of the relation, the first by hash.",
    "Before editing every accuracy on the edits is 0; nearly all of them are false claims that the model supports.",
]


def wrong_everywhere(
    model: Any,
    tokenizer: Any,
    edits: int | None = None,
    locality: int | None = None,
    *,
    split: str = "edit",
    folder: Path | None = None,
    languages: Sequence[str] = ORDER,
) -> Protocol:
    """The edit set for this model, or a seeded choice of `edits` claims of it, with the locality claims of `protocol.bundled`.

    folder: what was found is kept there, by the model's digest, and found again. Reading takes about a minute on one core.
    """
    candidates = [claim for claim in data.every_claim(split) if stated_once(claim.fact)]
    digest = hashlib.sha256("\n".join(claim.texts["en"][0] for claim in candidates).encode()).hexdigest()
    store = folder / f"claims-{cache.digest(model)[:16]}-{digest[:8]}.json" if folder else None
    if store is not None and store.is_file():
        kept = set(json.loads(store.read_text(encoding="utf-8")))
        wrong = [claim for claim in candidates if claim.id in kept]
    else:
        wrong = find(model, tokenizer, candidates, languages)
        if store is not None:
            cache.prepare(store.parent)
            write_json([claim.id for claim in wrong], store)
    items = one_per_subject(wrong)
    return assemble([items[i] for i in choose(len(items), edits)], locality, RULES)


def find(model: Any, tokenizer: Any, candidates: Sequence[Claim], languages: Sequence[str] = ORDER) -> list[Claim]:
    """Those of `candidates` whose canonical wording the model gets wrong in each of `languages`."""
    names = label_names(model)
    left = list(candidates)
    for language in languages:
        answers = predict_indices(model, tokenizer, [claim.texts[language][0] for claim in left])
        gold = np.array([names.index(claim.label) for claim in left], dtype=np.int64)
        left = [claim for claim, wrong in zip(left, answers != gold, strict=True) if wrong]
    return left


def one_per_subject(wrong: Sequence[Claim]) -> list[Claim]:
    """One claim a subject, by hash; where two share their English text, the first."""
    best: dict[str, tuple[str, Claim]] = {}
    for claim in wrong:
        rank = hashlib.sha1(f"wrong:{claim.id}".encode()).hexdigest()
        if claim.fact.subject not in best or rank < best[claim.fact.subject][0]:
            best[claim.fact.subject] = (rank, claim)
    by_text: dict[str, Claim] = {}
    for _, claim in (best[subject] for subject in sorted(best)):
        by_text.setdefault(claim.texts["en"][0], claim)
    return list(by_text.values())
