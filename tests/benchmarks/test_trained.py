"""The generator of trained patches, on a tiny classifier: real editors, few claims."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import xpatch
from xpatch.benchmarks import texts, trained, trained_base, trained_neurons, trained_scale, trained_shares
from xpatch.benchmarks.trained_base import Base

TINY = {"block": 32, "memory": 40, "steps": 15, "rounds": 1, "max_neurons": 1}


@pytest.fixture(scope="module")
def base():
    from transformers import BertConfig, BertForSequenceClassification

    _, tokenizer = xpatch.zoo.load("verifier")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.5, id2label={0: "REFUTES", 1: "SUPPORTS"},
        label2id={"REFUTES": 0, "SUPPORTS": 1}, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    return Base(model, tokenizer, ("en", "zh"), {"source": "tiny"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def make(base, folder, kind="default", neurons=24, rows=64, **settings):
    return trained.cases(
        kind, neurons, rows, base=base, folder=folder, progress=False, trained=24, settings=TINY, **settings
    )


def test_texts_of_edits_memory_and_rows_never_meet():
    requests = texts.requests(0, 0, 1100)
    edited = {version.text for request in requests for version in request.versions.values()}
    kept = {text for found in texts.memory().values() for text in found}
    rows = {seed: set(texts.held_out(1024, seed)) for seed in (0, 1)}
    assert len({request.id for request in requests}) == 1100
    assert not (rows[0] | rows[1]) & (kept | edited)
    assert len(rows[0]) == len(rows[1]) == 1024
    assert not rows[0] & rows[1]
    true = [request.target for request in requests].count("SUPPORTS")
    assert 950 < true < 1050  # every fact of the split once, then wrong objects


def test_claims_differ_from_seed_to_seed_and_go_on():
    first, second = (list(itertools.islice(texts.claims(seed), 1100)) for seed in (0, 1))
    assert len({item.texts["en"][0] for item in first}) > 1050
    assert [item.id for item in first] != [item.id for item in second]


def test_labels_of_the_memory_are_gold():
    items = dict(texts.labelled(("en",), 50))
    assert len(items) == 50
    for item in xpatch.zoo.verifier.data.claims("train"):
        for text in item.texts["en"][:2]:
            if text in items:
                assert items[text] == (item.label == "SUPPORTS")


def test_head_is_trained_and_lower_layers_stay(base, tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(base.tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(torch.seed() % 1000)
    encoder = BertModel(config).eval()
    inputs = dict(base.tokenizer(texts.held_out(5, 0, ("en",)), padding=True, return_tensors="pt"))
    with torch.no_grad():
        want = encoder(**inputs, output_hidden_states=True).hidden_states[2]
    store = tmp_path / "head.safetensors"
    made = trained_base.with_head(encoder, base.tokenizer, ("en",), "x", per_language=40, steps=3, store=store)
    with torch.no_grad():
        got = made.lower(inputs["input_ids"])
        again = made.lower(inputs["input_ids"][:, : inputs["input_ids"].shape[1]])
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[mask], want[mask], atol=0.1, rtol=0.1)  # bfloat16
    assert torch.equal(got, again)
    assert made.note["steps"] == 3
    shape = BertConfig(vocab_size=8, hidden_size=64, num_attention_heads=2, intermediate_size=32, pad_token_id=0)
    wide = trained_base.with_head(encoder, base.tokenizer, ("en",), "y", shape=shape, per_language=40, steps=2)
    with torch.no_grad():
        assert wide.model(**inputs).logits.shape == (5, 2)
    assert trained_neurons.rows(wide, ["A.", "B."], "read")["x"].shape == (2, 64)


@pytest.mark.parametrize("kind", ["default", "paper"])
def test_neurons_are_the_editors_own_and_kept(base, folder, kind, monkeypatch):
    case = make(base, folder, kind)
    assert case.activation == {"default": "relu", "paper": "gelu"}[kind]
    assert case.keys.shape == case.values.shape == (24, 32)
    assert case.x.shape == case.y.shape == (64, 32)
    assert case.histogram["distance"] == 0
    monkeypatch.setattr(xpatch, "edit", lambda *args, **settings: pytest.fail("trained again"))
    again = make(base, folder, kind)
    assert torch.equal(again.keys, case.keys) and torch.equal(again.x, case.x)


def test_y_is_what_the_ffn_gives(base, folder):
    layer = base.model.bert.encoder.layer[-1]
    for positions in ("read", "tokens"):
        case = make(base, folder, positions=positions)
        with torch.no_grad():
            torch.testing.assert_close(case.y, layer.output.dense(layer.intermediate(case.x)))


def test_resampled_neurons_keep_the_histogram(base, folder):
    case = make(base, folder, neurons=2000, rows=256)
    assert len(case.keys) == len(case.bias) == len(case.values) == 2000
    found = case.histogram
    assert found["distance"] < 0.06
    assert 0.5 * found["fires_before"] - 1e-3 < found["fires_after"] < 2 * found["fires_before"] + 1e-3
    assert len(case.keys.unique(dim=0)) == 2000
    text = trained.describe(case)
    assert "2000 neurons" in text and "pre-activation" in text


def test_outlier_coordinates_leave_the_scores(base, folder):
    plain, case = make(base, folder), make(base, folder, "outlier")
    where = (case.x != plain.x).any(0)
    assert int(where.sum()) == trained_scale.OUTLIERS
    ratio = case.x[:, where].mean(0).abs() / plain.x.square().mean().sqrt()
    assert 15 < float(ratio.min()) and float(ratio.max()) < 65
    torch.testing.assert_close(
        trained_scale.scores(case.keys, case.bias, case.x), trained_scale.scores(plain.keys, plain.bias, plain.x),
        atol=2e-3, rtol=1e-3,
    )  # fmt: skip
    assert torch.equal(case.keys[:, ~where], plain.keys[:, ~where])


def test_adversarial_fires_everywhere(base, folder):
    case = make(base, folder, "adversarial", dtype=torch.float32)
    assert float((case.x @ case.keys.T + case.bias).min()) > 0
    assert case.histogram["fires_after"] == 1.0


def test_wrong_names_are_refused(base):
    with pytest.raises(xpatch.XpatchError, match="kinds"):
        trained.cases("huge", 1, 1, base=base)
    with pytest.raises(xpatch.XpatchError, match="widths"):
        trained.cases("default", 1, 1, 99)
    with pytest.raises(xpatch.XpatchError, match="has not the width"):
        trained.cases("default", 1, 1, 320, source="wide")
    with pytest.raises(xpatch.XpatchError, match="choose one of"):
        trained_base.base("nothing")


def test_histogram_measures_the_distance():
    before = torch.randn(100, 50)
    assert trained_scale.histogram(before, before, "relu")["distance"] == 0
    assert trained_scale.histogram(before, before + 100, "relu")["distance"] > 0.99
    found = trained_scale.histogram(before, before, "gelu")
    assert found["cut"] == pytest.approx(-5.543) and found["fires_before"] == 1.0
    assert sum(found["before"]) == pytest.approx(1)


def test_shares_are_written_and_tabled(base, folder, tmp_path):
    result = trained_shares.run(
        tmp_path / "shares.json",
        neurons={"tiny": 24},
        bases={"tiny": base},
        rows=32,
        folder=folder,
        settings=TINY,
        progress=False,
    )
    assert json.loads((tmp_path / "shares.json").read_text())["points"] == json.loads(json.dumps(result["points"]))
    assert [(p["preset"], p["positions"]) for p in result["points"]] == [
        ("default", "read"), ("default", "tokens"), ("paper", "read"), ("paper", "tokens"),
    ]  # fmt: skip
    for point in result["points"]:
        assert 0 <= point["fires"] <= point["survives"]["0.005"] <= point["survives"]["0.01"] <= 100
        assert point["fires"] <= point["first_bound"]["16"]
    assert "| tiny | 32 | paper | tokens |" in trained_shares.table(result)
