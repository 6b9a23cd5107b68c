"""Every measure against a count by hand."""

from __future__ import annotations

import pytest

from xpatch.evaluation import metrics
from xpatch.evaluation.metrics import Answers


def answers(rows, own=True, cluster=None):
    """rows: (id, gold, before, after)."""
    ids, gold, before, after = zip(*rows, strict=True)
    return Answers(id=ids, cluster=cluster or ids, gold=gold, before=before, after=after, own=(own,) * len(ids))


PREDICTIONS = {
    "edit": {
        "en": answers([("a", 1, 0, 1), ("b", 1, 1, 1), ("c", 0, 0, 1), ("d", 0, 1, 0)]),
        "zh": answers([("a", 1, 0, 0), ("b", 1, 0, 1), ("c", 0, 0, 0), ("d", 0, 1, 0)], own=False),
    },
    "rephrase": {
        "en": answers([("a", 1, 0, 1), ("a", 1, 0, 0), ("b", 1, 1, 1), ("c", 0, 0, 0)]),
        "zh": answers([("a", 1, 0, 0), ("d", 0, 0, 0)], own=False),
    },
    "locality_train": {
        "en": answers([("0", 1, 1, 1), ("1", 0, 0, 1)]),
        "zh": answers([("0", 1, 0, 0), ("1", -1, 0, 1)]),
    },
    "locality_test": {"en": answers([("0", 1, 0, 0), ("1", 1, 0, 1)]), "zh": answers([("0", 1, 1, 1), ("1", 0, 1, 1)])},
}
NEEDED = {"a", "d"}


@pytest.fixture(scope="module")
def measured():
    return metrics.measure([(PREDICTIONS, NEEDED)])


def values(found):
    return {language: one.value for language, one in found.items()}


def test_reliability_and_mlg_are_in_the_edits_own_language(measured):
    assert measured.reliability.value == 3 / 4 and measured.reliability.n == 4
    assert measured.reliability_needed.value == 1
    assert measured.mlg.value == 3 / 4


def test_clg_is_over_the_other_languages_and_all_edits(measured):
    assert values(measured.clg) == {"zh": 3 / 4} and measured.clg_avg.value == 3 / 4


def test_needed_and_unseen(measured):
    assert values(measured.clg_needed) == {"en": 1, "zh": 1 / 2} and measured.clg_needed_avg.value == 3 / 4
    assert values(measured.clg_unseen) == {"en": 1 / 2, "zh": 1 / 2}
    assert values(measured.clg_unseen_all) == {"en": 3 / 4, "zh": 1 / 2}


def test_locality_is_against_gold_and_unchanged_against_the_unpatched(measured):
    assert measured.locality_train.value == 1 / 2 and measured.locality_train_before.value == 1
    assert measured.locality_test.value == 1 / 2 and measured.locality_test_before.value == 0
    assert measured.locality_train_by_language["zh"].n == 1  # without a gold label there is no accuracy
    assert values(measured.unchanged) == {"en": 2 / 4, "zh": 3 / 4}
    assert values(measured.unchanged_train) == {"en": 1 / 2, "zh": 1 / 2}
    assert values(measured.unchanged_test) == {"en": 1 / 2, "zh": 1}
    assert measured.unchanged_avg.value == 5 / 8


def test_before(measured):
    assert values(measured.before) == {"en": 1 / 2, "zh": 1 / 4}


def test_needed_ids_are_those_wrong_in_any_language():
    assert metrics.needed_ids(PREDICTIONS) == {"a", "b", "d"}


def test_runs_are_pooled_over_texts_with_shared_clusters(measured):
    pooled = metrics.measure([(PREDICTIONS, NEEDED), (PREDICTIONS, NEEDED)])
    assert pooled.reliability.value == measured.reliability.value
    assert (pooled.reliability.low, pooled.reliability.high) == (measured.reliability.low, measured.reliability.high)
    assert pooled.reliability.n == 8 and pooled.reliability.clusters == 4


def test_what_was_not_asked_is_absent():
    bare = metrics.measure([({"edit": {"en": PREDICTIONS["edit"]["en"]}}, set())])
    assert (
        bare.mlg is None
        and bare.clg == {}
        and bare.clg_avg is None
        and bare.clg_needed == {}
        and bare.unchanged_avg is None
    )
    assert bare.reliability.value == 3 / 4
