"""Answers from texts that were read once equal those of whole calls, for every form and place of patches."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import xpatch
from xpatch.errors import MismatchError
from xpatch.evaluation import Readings, evaluate, predict_indices, readings
from xpatch.models.anatomy import final_ffn, find_ffn_sites
from xpatch.patches.forms import DenseDelta, Gate, LanguageMask, LowRankDelta, PatchNeurons
from xpatch.patches.requests import Probe
from xpatch.patches.types import PatchSet


def texts(count, seed=0):
    rng = random.Random(seed)
    return [Probe(text=" ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(3, 12)))) for _ in range(count)]


def neurons(site, seed=1, **names):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 6, 32, generator=generator)
    return PatchNeurons(site.name, keys, torch.zeros(6), 3 * values, "relu", **names)


def sets(model):
    """One set of each form at the final FFN, and one with language masks."""
    site = final_ffn(model)
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(64, 32, generator=generator), torch.randn(32, 64, generator=generator)
    mask = LanguageMask(("en", "zh"), torch.tensor([[0.0], [1.0]]).repeat(1, 32), torch.ones(2, 32))
    ball = Gate("ball", torch.randn(3, 32, generator=generator), torch.full((3,), 7.0))
    return {
        "neurons": PatchSet({"n": neurons(site)}),
        "dense": PatchSet({"u": DenseDelta(site.up, up, torch.ones(64)), "d": DenseDelta(site.down, down)}),
        "lowrank": PatchSet({"d": LowRankDelta(site.down, down[:2], up[:2].T.contiguous())}),
        "masked": PatchSet({"n": neurons(site, mask="m")}, masks={"m": mask}),
        "gated": PatchSet({"n": neurons(site, gate="g")}, gates={"g": ball}),
    }


@pytest.mark.parametrize("form", ["neurons", "dense", "lowrank", "masked", "gated"])
def test_answers_equal_those_of_whole_calls(model, tokenizer, form, monkeypatch):
    probes = texts(300)
    languages = ["en" if i % 2 else "zh" for i in range(300)]
    before = predict_indices(model, tokenizer, probes)
    read = Readings(model, tokenizer)
    assert np.array_equal(read.before(probes), before)
    xpatch.apply(model, sets(model)[form], name="p")
    whole = predict_indices(model, tokenizer, probes, languages=languages)
    assert (whole != before).any() and (whole == before).any()
    asked = []
    real = readings.predict_indices
    monkeypatch.setattr(readings, "predict_indices", lambda m, t, p, **k: asked.append(len(p)) or real(m, t, p, **k))
    assert np.array_equal(read.after(probes, languages), whole)
    assert sum(asked) < 30  # only close answers
    xpatch.remove(model)
    assert np.array_equal(read.after(probes), before)


def test_close_answers_are_asked_in_full(model, tokenizer, monkeypatch):
    probes = texts(40)
    read = Readings(model, tokenizer)
    xpatch.apply(model, sets(model)["neurons"], name="p")
    whole = predict_indices(model, tokenizer, probes)
    monkeypatch.setattr(readings, "CLOSE", 1e9)
    monkeypatch.setattr(read, "_logits", lambda at, languages: torch.zeros(len(at), 2))
    assert np.array_equal(read.after(probes), whole)


def test_patches_below_the_final_ffn_are_asked_in_full(model, tokenizer):
    probes = texts(60)
    read = Readings(model, tokenizer)
    read.before(probes)
    xpatch.apply(model, PatchSet({"n": neurons(find_ffn_sites(model)[0])}), name="low")
    whole = predict_indices(model, tokenizer, probes)
    assert np.array_equal(read.after(probes), whole) and (whole != read.before(probes)).any()


def test_a_masked_set_is_asked_each_text_in_its_language(model, tokenizer):
    """The mask of `en` silences every neuron: there nothing may change, with readings or without."""
    cases = [
        {"id": str(i), "target": "SUPPORTS", "versions": {"en": {"text": probe.text}, "zh": {"text": probe.text}}}
        for i, probe in enumerate(texts(60))
    ]
    patches = sets(model)["masked"]
    plain = evaluate(model, tokenizer, cases, patches)
    found = evaluate(model, tokenizer, cases, patches, readings=Readings(model, tokenizer))
    assert plain.predictions == found.predictions
    en, zh = (plain.predictions["edit"][language] for language in ("en", "zh"))
    assert en.before == en.after == zh.before != zh.after


def test_texts_are_read_once(model, tokenizer, monkeypatch):
    read = Readings(model, tokenizer)
    probes = texts(20)
    read.before(probes + probes[:5])
    assert len(read) == 20
    monkeypatch.setattr(readings, "capture", lambda *a: pytest.fail("read again"))
    read.before(probes)
    monkeypatch.undo()
    more = texts(5, seed=9)
    assert np.array_equal(read.before(probes[:3] + more), predict_indices(model, tokenizer, probes[:3] + more))


def test_a_failed_reading_is_read_again(model, tokenizer, monkeypatch):
    read = Readings(model, tokenizer)
    probes = texts(10)
    monkeypatch.setattr(readings, "capture", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError):
        read.before(probes)
    monkeypatch.undo()
    assert np.array_equal(read.before(probes), predict_indices(model, tokenizer, probes))


def test_readings_of_another_model_are_refused(model, tokenizer):
    import copy

    with pytest.raises(MismatchError, match="another model"):
        evaluate(
            copy.deepcopy(model),
            tokenizer,
            [{"id": "1", "text": "w1", "target": "SUPPORTS"}],
            readings=Readings(model, tokenizer),
        )
