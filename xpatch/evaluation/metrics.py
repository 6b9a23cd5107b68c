"""The measures, one idea each, with bootstrap intervals.

Notation: `f` the model before, `f'` after editing; `E` the edit set with versions `x_l` in languages `l` and target `y`;
`E_needed ⊆ E` the edits the method found to be needed; `I(·)` is 1 or 0; a bar is a mean. Equation numbers are those of MPN
(arXiv:2401.03190). All are measured after the whole set of edits is in place, never edit by edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from xpatch.evaluation.bootstrap import Estimate, Tally, estimate, merge, tally


class Answers(BaseModel):
    """Predictions on one kind of text in one language, as parallel columns.

    id: the case (or the locality probe) asked about; cluster: what is resampled together; gold: class index, -1 where unknown;
    before, after: class index without and with the patches; own: whether this is the language the edit was written in.
    """

    model_config = ConfigDict(frozen=True)

    id: tuple[str, ...]
    cluster: tuple[str, ...]
    gold: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    own: tuple[bool, ...]


# kind ("edit", "rephrase", "portability", "near", "locality_train", "locality_test") -> language -> answers
Predictions = Mapping[str, Mapping[str, Answers]]


class Metrics(BaseModel):
    """Every measure of one evaluation; None or an empty mapping where the cases hold no such texts."""

    model_config = ConfigDict(frozen=True)

    before: dict[str, Estimate] = {}
    reliability: Estimate | None = None
    reliability_needed: Estimate | None = None
    mlg: Estimate | None = None
    clg: dict[str, Estimate] = {}
    clg_avg: Estimate | None = None
    clg_needed: dict[str, Estimate] = {}
    clg_needed_avg: Estimate | None = None
    clg_unseen: dict[str, Estimate] = {}
    clg_unseen_avg: Estimate | None = None
    clg_unseen_all: dict[str, Estimate] = {}
    clg_unseen_all_avg: Estimate | None = None
    portability: dict[str, Estimate] = {}
    near_unchanged: dict[str, Estimate] = {}
    locality_train: Estimate | None = None
    locality_test: Estimate | None = None
    locality_train_before: Estimate | None = None
    locality_test_before: Estimate | None = None
    locality_train_by_language: dict[str, Estimate] = {}
    locality_test_by_language: dict[str, Estimate] = {}
    unchanged: dict[str, Estimate] = {}
    unchanged_avg: Estimate | None = None
    unchanged_train: dict[str, Estimate] = {}
    unchanged_test: dict[str, Estimate] = {}


def before(p: Predictions) -> dict[str, Tally]:
    """Where it started: for each language l, the own one too, mean over E of I(f(x_l) = y)."""
    return _by_language(p, "edit", _was_correct)


def reliability(p: Predictions, ids: Iterable[str] | None = None) -> Tally | None:
    """Accuracy on the edits in the language they were written in: mean over E of I(f'(x_en) = y). MPN eq. 10.

    Over the whole edit set, so the unpatched model does not score 0; with `ids`, over those edits (the needed ones) alone.
    """
    return _over(p, "edit", _correct, own=True, ids=ids)


def mlg(p: Predictions, ids: Iterable[str] | None = None) -> Tally | None:
    """Monolingual generalisation: mean over the rephrases of E in the edit's own language of I(f'(x') = y). MPN eq. 11."""
    return _over(p, "rephrase", _correct, own=True, ids=ids)


def clg(p: Predictions, ids: Iterable[str] | None = None) -> dict[str, Tally]:
    """Cross-lingual generalisation: for each other language l, mean over E of I(f'(x_l) = y). MPN eq. 12.

    These are the parallel texts of the edits, the very texts MPN (all) is trained on: for that method this is a training
    accuracy. `clg_unseen` is what a user gets.
    """
    return _by_language(p, "edit", _correct, own=False, ids=ids)


def clg_needed(p: Predictions, ids: Iterable[str]) -> dict[str, Tally]:
    """Needed edits right: for each language l, the own one too, mean over E_needed of I(f'(x_l) = y)."""
    return _by_language(p, "edit", _correct, ids=ids)


def clg_unseen(p: Predictions, ids: Iterable[str] | None = None) -> dict[str, Tally]:
    """Unseen paraphrases right: for each language l, the own one too, mean of I(f'(x'_l) = y) over the cases' rephrases.

    With `ids` over E_needed (`clg_unseen`), without over E (`clg_unseen_all`). Unseen means that the caller trained on other
    wordings; nothing here can check it.
    """
    return _by_language(p, "rephrase", _correct, ids=ids)


def portability(p: Predictions, ids: Iterable[str] | None = None) -> dict[str, Tally]:
    """What follows from the edit: for each language, mean of I(f'(x') = y') over the cases' portability probes."""
    return _by_language(p, "portability", _correct, ids=ids)


def locality(p: Predictions, kind: str, *, unpatched: bool = False) -> dict[str, Tally]:
    """Accuracy on other subjects against their gold labels: mean of I(f'(x) = y), or of I(f(x) = y) with `unpatched`. MPN eq. 13.

    kind "locality_train" (like what the classifier was trained on) or "locality_test". The paper's figure is English alone.
    """
    return _by_language(p, kind, _was_correct if unpatched else _correct)


def unchanged(p: Predictions, kinds: Sequence[str] = ("locality_train", "locality_test")) -> dict[str, Tally]:
    """Predictions on other subjects that stay: for each language, mean of I(f'(x) = f(x)); it needs no gold label."""
    found: dict[str, list[Tally]] = {}
    for kind in kinds:
        for language, counted in _by_language(p, kind, _same).items():
            found.setdefault(language, []).append(counted)
    return {language: merge(counted) for language, counted in found.items()}


def needed_ids(p: Predictions) -> set[str]:
    """The edits the unpatched model gets wrong in any language (the rule of MPN (all))."""
    return {
        case
        for answers in p.get("edit", {}).values()
        for case, gold, before in zip(answers.id, answers.gold, answers.before, strict=True)
        if gold != before
    }


def measure(runs: Sequence[tuple[Predictions, set[str]]], language: str = "en", seed: int = 0) -> Metrics:
    """All metrics of one run, or of several runs pooled (seeds: the same clusters are resampled together over all runs).

    runs: `(predictions, needed ids)` each. language: the one the locality headline is measured in.
    """

    def one(tallies: list[Tally | None]) -> Estimate | None:
        found = [one for one in tallies if one is not None]
        return estimate([merge(found)], seed=seed) if found else None

    def per_language(tallies: list[dict[str, Tally]]) -> dict[str, Tally]:
        keys = dict.fromkeys(key for one in tallies for key in one)
        return {key: merge([one[key] for one in tallies if key in one]) for key in keys}

    def each(tallies: dict[str, Tally]) -> dict[str, Estimate]:
        return {key: estimate([one], seed=seed) for key, one in tallies.items()}

    def mean(tallies: dict[str, Tally]) -> Estimate | None:
        return estimate(list(tallies.values()), seed=seed) if tallies else None

    cross = per_language([clg(p) for p, _ in runs])
    cross_needed = per_language([clg_needed(p, ids) for p, ids in runs])
    unseen = per_language([clg_unseen(p, ids) for p, ids in runs])
    unseen_all = per_language([clg_unseen(p) for p, _ in runs])
    kept = per_language([unchanged(p) for p, _ in runs])
    near = per_language([unchanged(p, ("near",)) for p, _ in runs])
    gold = {
        (kind, unpatched): each(per_language([locality(p, kind, unpatched=unpatched) for p, _ in runs]))
        for kind in ("locality_train", "locality_test")
        for unpatched in (False, True)
    }
    return Metrics(
        before=each(per_language([before(p) for p, _ in runs])),
        reliability=one([reliability(p) for p, _ in runs]),
        reliability_needed=one([reliability(p, ids) for p, ids in runs]),
        mlg=one([mlg(p) for p, _ in runs]),
        clg=each(cross),
        clg_avg=mean(cross),
        clg_needed=each(cross_needed),
        clg_needed_avg=mean(cross_needed),
        clg_unseen=each(unseen),
        clg_unseen_avg=mean(unseen),
        clg_unseen_all=each(unseen_all),
        clg_unseen_all_avg=mean(unseen_all),
        portability=each(per_language([portability(p) for p, _ in runs])),
        near_unchanged=each(near),
        locality_train=gold["locality_train", False].get(language),
        locality_test=gold["locality_test", False].get(language),
        locality_train_before=gold["locality_train", True].get(language),
        locality_test_before=gold["locality_test", True].get(language),
        locality_train_by_language=gold["locality_train", False],
        locality_test_by_language=gold["locality_test", False],
        unchanged=each(kept),
        unchanged_avg=mean(kept),
        unchanged_train=each(per_language([unchanged(p, ("locality_train",)) for p, _ in runs])),
        unchanged_test=each(per_language([unchanged(p, ("locality_test",)) for p, _ in runs])),
    )


Marks = Callable[[Answers], np.ndarray]


def _correct(answers: Answers) -> np.ndarray:
    return np.array(answers.after) == np.array(answers.gold)


def _was_correct(answers: Answers) -> np.ndarray:
    return np.array(answers.before) == np.array(answers.gold)


def _same(answers: Answers) -> np.ndarray:
    return np.array(answers.before) == np.array(answers.after)


def _tally(answers: Answers, marks: Marks, own: bool | None, ids: Iterable[str] | None) -> Tally | None:
    """Count one language's texts: those in the edit's own language or the others, of the edits `ids`, with a gold label."""
    keep = np.ones(len(answers.id), dtype=bool)
    if own is not None:
        keep &= np.array(answers.own, dtype=bool) == own
    if ids is not None:
        wanted = set(ids)
        keep &= np.array([case in wanted for case in answers.id], dtype=bool)
    if marks is not _same:
        keep &= np.array(answers.gold) >= 0
    if not keep.any():
        return None
    return tally([name for name, kept in zip(answers.cluster, keep, strict=True) if kept], marks(answers)[keep])


def _by_language(
    p: Predictions, kind: str, marks: Marks, own: bool | None = None, ids: Iterable[str] | None = None
) -> dict[str, Tally]:
    found = {language: _tally(answers, marks, own, ids) for language, answers in p.get(kind, {}).items()}
    return {language: counted for language, counted in found.items() if counted is not None}


def _over(
    p: Predictions, kind: str, marks: Marks, own: bool | None = None, ids: Iterable[str] | None = None
) -> Tally | None:
    counted = list(_by_language(p, kind, marks, own, ids).values())
    return merge(counted) if counted else None
