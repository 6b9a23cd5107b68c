"""The bundled facts, templates and splits."""

from __future__ import annotations

import collections
import hashlib
from pathlib import Path

import pytest

from xpatch.zoo.verifier import data, facts

# Changing a fact or a split changes every published figure: this digest has to be changed on purpose.
FACTS_SHA256 = "6e7a3c96c10d3320eb6d195d4496d1597c14181f65d4ecaa9598418b10e12cbb"


def test_facts_file_is_the_published_one():
    assert hashlib.sha256(Path(facts.FACTS_FILE).read_bytes()).hexdigest() == FACTS_SHA256


def test_splits_are_by_subject_and_follow_the_hash():
    splits = collections.defaultdict(set)
    for fact in data.facts():
        splits[fact.subject].add(fact.split)
        assert fact.split == facts.split_of(fact.subject)
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "edit", "validation", "test"}


def test_every_fact_has_one_object_and_six_languages():
    seen = collections.Counter((fact.relation, fact.subject) for fact in data.facts())
    assert set(seen.values()) == {1}
    for fact in data.facts():
        assert tuple(fact.labels) == data.LANGUAGES
        assert all(subject.strip() and obj.strip() for subject, obj in fact.labels.values())


@pytest.mark.parametrize("language", data.LANGUAGES)
def test_templates_are_distinct_and_name_both_ends(language):
    for relation in data.RELATIONS:
        patterns = data.templates()[language][relation]
        assert len(set(patterns)) == data.TEMPLATES >= 3
        assert all(pattern.count("[X]") == pattern.count("[Y]") == 1 for pattern in patterns)
        assert all(pattern.endswith("。" if language == "zh" else ".") for pattern in patterns)


def test_false_claims_name_another_object_in_every_language():
    for claim in data.claims("edit"):
        if claim.label == "REFUTES":
            for language in data.LANGUAGES:
                subject, true = claim.fact.labels[language]
                assert claim.texts[language][0] != data.sentence(claim.fact.relation, language, 0, subject, true)


def test_requests_and_cases_share_ids_but_no_paraphrase():
    requests, cases = data.requests("edit"), data.cases("edit")
    assert [r.id for r in requests] == [c.id for c in cases] and len(requests) > 700
    assert len({r.id.rpartition("-")[0] for r in requests}) == len(requests)
    for request, case in zip(requests, cases, strict=True):
        for language, version in request.versions.items():
            trained = {version.text, *(probe.text for probe in version.rephrases)}
            measured = {probe.text for probe in case.versions[language].rephrases}
            assert len(measured) == 2 and not trained & measured


def test_enough_locality_claims_of_each_kind():
    for split in ("train", "test"):
        found = data.locality(split, templates=(0, 2, 3))
        assert all(len({probe.text for probe in probes}) >= 2000 for probes in found.values())
        assert {probe.target for probes in found.values() for probe in probes} == set(data.LABELS)


def test_edits_and_memory_share_no_text():
    memory = {text for texts in data.memory_texts().values() for text in texts}
    edited = {v.text for request in data.requests("edit") for v in request.versions.values()}
    # A capital and the place it is the capital of are two facts in one sentence.
    assert len(memory & edited) < 0.02 * len(edited)
