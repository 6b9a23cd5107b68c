"""Editing at speed and at scale on tiny models: real editors, few claims, the published procedure beside them."""

from __future__ import annotations

import json

import pytest
import torch

import xpatch
from xpatch.benchmarks import editing, editing_claims, editing_rows, editing_scale, speed_blocks, texts
from xpatch.benchmarks.editing import Size
from xpatch.benchmarks.plain_editor import PlainEditor
from xpatch.benchmarks.resident import watching
from xpatch.benchmarks.trained_base import Base

LANGUAGES = ("en", "de", "zh")
QUICK = {"learning_rate": 0.05, "memory_weight": 0.5}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of tiny problems spend their time waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base():
    """A random BERT that reads the verifier's words; wide weights, so that rows of different texts differ."""
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
    return Base(model, tokenizer, LANGUAGES, {"source": "tiny"})


def run(base, out=None, **settings):
    size = Size({"plain": 2, "cached": 3, "chunked": 6}, memory=20, watched=10)
    return editing.run(
        out, bases=["tiny"], given={"tiny": (base, size)}, seeds=(0, 1), progress=False, **{"steps_each": 30, **QUICK, **settings}
    )  # fmt: skip


def test_rows_compare_the_procedures_at_equal_steps(base, tmp_path, monkeypatch):
    before = editing.cache.digest(base.model)
    out = tmp_path / "editing.json"
    result = run(base, out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    found = {row["procedure"]: row for row in result["rows"]}
    assert list(found) == ["plain", "cached", "chunked"]
    assert "| tiny | plain, 30 steps | 2 |" in speed_blocks.editing_block(result)
    assert [row["edits"] for row in found.values()] == [2, 3, 6]
    assert {row["steps"] for row in found.values()} == {30}
    for row in found.values():
        assert len(row["runs"]) == 2 and row["seeds"] == [0, 1] and row["threads"] == torch.get_num_threads()
        assert (
            row["edits_per_s"] > 0
            and row["edits_per_cpu_s"] > 0
            and 0 <= row["memory_seconds"] < row["seconds"]
            and row["peak_mb"] >= 0
        )
        for field in ("right", "reliability", "clg_avg", "locality"):
            assert 0 <= row[field] <= 100
        low, high = row["spread"]["edits_per_s"]
        assert low <= row["edits_per_s"] <= high
    assert found["cached"]["right"] > 60 and found["chunked"]["right"] > 60
    assert {(row["base"], row["procedure"]) for row in result["speedups"]} == {("tiny", "cached"), ("tiny", "chunked")}
    assert editing.cache.digest(base.model) == before

    monkeypatch.setattr(xpatch, "edit", lambda *args, **options: pytest.fail("edited again"))
    monkeypatch.setattr(editing, "PlainEditor", lambda *args, **options: pytest.fail("edited again"))
    assert run(base, out)["rows"] == result["rows"]


def test_plain_needs_a_fixed_number_of_steps(base):
    with pytest.raises(xpatch.XpatchError, match="early_stop"):
        run(base, procedures=("plain",), early_stop=True)


@pytest.mark.parametrize("coordinates", ["plain", "whitened"])
def test_plain_trains_what_the_patched_model_answers(base, coordinates):
    claims = editing_claims.needed(base.model, base.tokenizer, 3, 0, LANGUAGES)
    requests = editing_claims.requests(claims, LANGUAGES)
    used = {**editing._hyperparameters(base, {"steps": 30, **QUICK, "coordinates": coordinates}), "memory_per_step": 16}
    memory = texts.memory(LANGUAGES, 10)
    flags = [(p.requires_grad, p.grad) for p in base.model.parameters()]
    made = PlainEditor(base.model, base.tokenizer, used, 0).edit(requests, memory)
    assert [(p.requires_grad, p.grad) for p in base.model.parameters()] == flags
    part = made.patches.parts["neurons"]
    assert 1 <= part.count <= 3 and part.activation == "relu" and len(made.right) == 3 and made.memory_seconds > 0
    again = PlainEditor(base.model, base.tokenizer, used, 0).edit(requests, memory)
    assert torch.equal(again.patches.parts["neurons"].keys, part.keys)
    report = xpatch.evaluate(base.model, base.tokenizer, requests[-1:], made.patches)
    assert (editing_rows.all_right(report) == 100) == made.right[-1]  # nothing came after the last edit


def test_plain_and_cached_train_the_same_first_edit(base):
    """One step on the same rows, from the same start: the forward of the model and the cached rows give the same gradient."""
    claim = editing_claims.needed(base.model, base.tokenizer, 1, 0, LANGUAGES)
    requests = editing_claims.requests(claim, LANGUAGES)
    settings = {
        "coordinates": "plain",
        "memory_noise": 0,
        "steps": 1,
        "rounds": 0,
        "rescue": False,
        "keep_failed": True,
        "memory_per_step": 0,
    }
    memory = texts.memory(LANGUAGES, 10)
    ours = xpatch.edit(base.model, base.tokenizer, requests, memory=memory, progress=False, **settings)
    used = ours.edits[0].hyperparameters
    plain = PlainEditor(base.model, base.tokenizer, used, 0).edit(requests, memory).patches
    torch.testing.assert_close(plain.parts["neurons"].keys, ours.parts["neurons"].keys, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plain.parts["neurons"].bias, ours.parts["neurons"].bias, rtol=1e-3, atol=1e-4)


def test_claims_are_needed_and_of_other_subjects(base):
    chosen = editing_claims.needed(base.model, base.tokenizer, 40, 0, LANGUAGES)
    assert len(chosen) == 40 == len({tuple(item.texts["en"]) for item in chosen})
    assert {item.fact.split for item in chosen} == {"train"}
    requests = editing_claims.requests(chosen, LANGUAGES)
    report = xpatch.evaluate(base.model, base.tokenizer, requests)
    assert editing_rows.all_right(report) == 0
    assert chosen[:10] == editing_claims.needed(base.model, base.tokenizer, 10, 0, LANGUAGES)
    unseen = {
        p.text for case in editing_claims.cases(chosen, LANGUAGES) for v in case.versions.values() for p in v.rephrases
    }
    trained = {p.text for request in requests for v in request.versions.values() for p in (v.probe, *v.rephrases)}
    kept = {probe.text for probes in editing_claims.watched(50, LANGUAGES).values() for probe in probes}
    assert not unseen & trained and not kept & (unseen | trained)


def test_claims_are_made_again_from_their_names():
    stream = texts.claims(3, "train")
    claims = [next(stream) for _ in range(900)]
    assert editing_claims.recall([editing_claims.name(item) for item in claims]) == claims


def test_scale_counts_what_holds_and_draws_it(base, tmp_path):
    out = tmp_path / "scale.json"
    settings = {"steps": 30, "chunk": 4, "mates_per_step": 16, **QUICK}
    result = editing_scale.run(out, counts=(4, 12), given=base, progress=False, **settings)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    for row, count in zip(result["rows"], (4, 12), strict=True):
        assert row["edits"] == count == sum(row["status"].values()) and row["neurons"] <= 2 * count
        held = row["status"].get("edited", 0) + row["status"].get("already-right", 0)
        assert row["retention"] == round(100 * held / count, 2)
        assert row["right_asked"] == row["retention"]  # the patched model itself says what the ledger says
        assert row["curve"][-1][0] == count and row["curve"] == sorted(row["curve"])
        assert 0 < row["train_cpu_s_per_edit"] < row["cpu_s_per_edit"]
    assert [goal["what"][:8] for goal in result["goals"]] == ["12 edits", "processo"]
    for name in ("scale.svg", "scale_success.svg"):
        assert (tmp_path / name).read_text().startswith("<svg")
    editing_scale.table(result)


def test_the_peak_of_the_memory_is_seen():
    with watching() as watch:
        held = torch.ones(30_000_000)
        watch.note(7)
        watch.look()
        del held
    if watch.peak_mb is None:
        pytest.skip("the system does not tell the resident memory")
    assert 100 < watch.peak_mb < 400
    assert watch.trace
