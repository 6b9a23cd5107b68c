"""Each edit by itself: what `select` and `evaluate` give one by one, in one report."""

from __future__ import annotations

import random

import pytest
import torch

import xpatch
from xpatch.errors import MismatchError
from xpatch.evaluation import evaluate, evaluate_alone, pool, predict
from xpatch.models.anatomy import final_ffn
from xpatch.patches.requests import Probe
from xpatch.patches.types import EditRecord, PatchNeurons, PatchSet

LABELS = ("REFUTES", "SUPPORTS")


def sentence(seed):
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(60)}" for _ in range(8))


@pytest.fixture
def cases():
    return [
        {
            "id": f"c{i}",
            "target": LABELS[i % 2],
            "versions": {k: {"text": sentence(f"{i}{k}"), "rephrases": [sentence(f"{i}{k}r")]} for k in ("en", "zh")},
        }
        for i in range(6)
    ]


@pytest.fixture
def locality():
    return {k: [Probe(text=sentence(f"{k}{i}"), target=LABELS[i % 2]) for i in range(20)] for k in ("en", "zh")}


@pytest.fixture
def patches(model):
    """Three edits with a neuron each, one that failed and owns nothing, two that needed none."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 3, 32, generator=generator)
    part = PatchNeurons(final_ffn(model).name, keys, torch.zeros(3), 20 * values, "relu")
    edits = [EditRecord(f"c{i}", "mpn", "edited", rows={"n": (i,)}) for i in range(3)]
    edits += [EditRecord("c3", "mpn", "failed"), *(EditRecord(f"c{i}", "mpn", "already-right") for i in (4, 5))]
    return PatchSet({"n": part}, edits=tuple(edits))


def test_answers_are_those_of_each_edit_alone(model, tokenizer, cases, locality, patches):
    report = evaluate_alone(
        model, tokenizer, cases, patches, locality_train=locality, locality_test=locality, locality_per_edit=3
    )
    assert report.needed == ("c0", "c1", "c2", "c3") and report.edits == 4
    for i, case in enumerate(cases[:4]):
        single = evaluate(model, tokenizer, [case], patches.select([case["id"]]))
        for kind in ("edit", "rephrase"):
            for language in ("en", "zh"):
                found, wanted = (r.predictions[kind][language] for r in (report, single))
                row = found.id.index(f"c{i}")
                assert (found.before[row], found.after[row]) == (wanted.before[0], wanted.after[0])
    assert report.predictions["edit"]["zh"].before[3] == report.predictions["edit"]["zh"].after[3]
    drawn = {language: report.predictions["locality_test"][language].id for language in ("en", "zh")}
    assert drawn["en"] == drawn["zh"] and len(set(drawn["en"])) == 12
    assert 0 < report.metrics.unchanged_avg.value < 1


def test_equal_seeds_draw_equal_texts(model, tokenizer, cases, locality, patches):
    one, two, other = (
        evaluate_alone(model, tokenizer, cases, patches, locality_test=locality, seed=seed) for seed in (0, 0, 1)
    )
    assert one.predictions == two.predictions != other.predictions
    assert pool([one, other]).unchanged["zh"].n == 2 * one.metrics.unchanged["zh"].n
    with pytest.raises(MismatchError, match="baseline"):
        evaluate(model, tokenizer, cases, patches, locality_test=locality, baseline=one)


def test_the_model_is_left_as_it_was(model, tokenizer, cases, locality, patches):
    texts = [probe.text for probe in locality["en"]]
    before = predict(model, tokenizer, texts)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    evaluate_alone(model, tokenizer, cases, patches)
    broken = [{**cases[0], "target": "MAYBE"}]
    with pytest.raises(MismatchError, match="MAYBE"):
        evaluate_alone(model, tokenizer, broken, patches)
    assert predict(model, tokenizer, texts) == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not xpatch.status(model).sets


def test_sets_can_be_made_one_by_one(model, tokenizer, cases, patches):
    asked = []

    def one(case):
        asked.append(case.id)
        return patches.select([case.id])

    report = evaluate_alone(model, tokenizer, cases[:3], one)
    assert asked == ["c0", "c1", "c2"]
    assert report.predictions == evaluate_alone(model, tokenizer, cases[:3], patches).predictions


def test_nothing_needed(model, tokenizer, cases, patches):
    with pytest.raises(MismatchError, match="needed"):
        evaluate_alone(model, tokenizer, cases[4:], patches)
