"""The latency benchmark of whole models on tiny ones: every side, the placed patches, one-token steps."""

from __future__ import annotations

import json

import pytest
import torch

import xpatch
from xpatch.benchmarks import baseline, latency, model_latency, model_patches, model_shapes
from xpatch.ops import native

PLAIN = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "bos_token_id": 0, "eos_token_id": 0}
TINY = {
    "bert-base": {**PLAIN, "initializer_range": 0.5},
    "xlmr-base": PLAIN,
    "gpt2": {**GPT2, "initializer_range": 0.5},
    "llama-1b": {**PLAIN, "num_key_value_heads": 2, "head_dim": 8},
}


def tiny(name):
    return model_shapes.subject(name, **TINY[name])


@pytest.fixture
def run(drawn_cases):
    def call(out=None, **more):
        settings = {"patches": 40, "batches": (1, 3), "tokens": (6,), "repeats": 15}
        return model_latency.run(
            out, **{**settings, **more}, cases=drawn_cases, progress=False, command=["xpatch", "bench"]
        )

    return call


@pytest.mark.parametrize("name", ["bert-base", "gpt2"])
def test_the_result_has_every_field(run, tmp_path, name):
    out = tmp_path / "latency.json"
    result = run(out, models=[tiny(name)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert [(row["batch"], row["tokens"]) for row in result["rows"]] == [(1, 6), (3, 6)]
    for row in result["rows"]:
        assert (row["model"], row["backend"], row["patches"], row["repeats"]) == (name, "torch", 40, 15)
        for side in model_latency.SIDES:
            assert row[f"{side}_ms"] > 0 and row[f"{side}_iqr_ms"] >= 0
        assert row["ratio"] == pytest.approx(row["patched_ms"] / row["unpatched_ms"], abs=1e-3)
        assert row["ratio_optimized"] == pytest.approx(row["patched_ms"] / row["unpatched_optimized_ms"], abs=1e-3)
        # The patches act, and act alike however they are computed.
        assert max(row["max_logit_diff"], row["full_logit_diff"]) <= 1e-4 * max(row["largest_logit"], 1.0)
    assert max(row["moved"] for row in result["rows"]) > 1e-3
    assert result["models"][0]["source"] == "drawn" and result["models"][0]["dtype"] == "fp32"


@pytest.mark.parametrize("name", model_shapes.NAMES)
def test_every_named_shape_runs(run, name):
    row = run(models=[tiny(name)], batches=(2,))["rows"][0]
    assert row["model"] == name and row["dtype"] in ("fp32", "bf16")
    assert row["max_logit_diff"] <= (1e-4 if row["dtype"] == "fp32" else 0.1) * max(row["largest_logit"], 1.0)


def test_finished_rows_are_reused(run, tmp_path, monkeypatch):
    made = []
    row = model_latency.Bench.row
    monkeypatch.setattr(model_latency.Bench, "row", lambda *args: made.append(args[1:3]) or row(*args))
    first = run(tmp_path / "l.json", models=[tiny("bert-base")])
    assert run(tmp_path / "l.json", models=[tiny("bert-base")])["rows"] == first["rows"]
    run(tmp_path / "l.json", models=[tiny("bert-base")], batches=(1, 2))
    assert made == [(1, 6), (3, 6), (2, 6)]


def test_placed_patches_fire_as_often_as_where_they_were_trained(drawn_cases):
    case = drawn_cases("default", 200, 256, 32, seed=0)
    x, y = 5 + 3 * torch.randn(64, 32), 2 * torch.randn(64, 32)
    neurons, shares = model_patches.place(case, x, y, "site")
    assert 0 < shares["wanted_share"] and shares["fired_share"] == pytest.approx(
        shares["wanted_share"], abs=2 / (64 * 200)
    )
    assert shares["fired_share"] == model_patches.fired_share(x, neurons) and neurons.activation == "relu"


def test_patches_of_another_width_keep_their_geometry(drawn_cases):
    case = drawn_cases("default", 20, 64, 16, seed=0)
    x = torch.randn(8, 48)
    neurons, _ = model_patches.place(case, x, torch.randn(8, 48), "site")
    assert neurons.keys.shape == neurons.values.shape == (20, 48)

    def cosines(rows):
        rows = torch.nn.functional.normalize(rows, dim=1)
        return rows @ rows.t()

    torch.testing.assert_close(cosines(neurons.keys), cosines(case.keys), atol=1e-5, rtol=1e-5)


def test_widths_that_were_not_trained_take_the_patches_of_768(drawn_cases):
    def cases(kind, **more):
        if more["width"] != 768:
            raise xpatch.XpatchError("no such width")
        return drawn_cases(kind, **more)

    assert model_patches.case_for(2048, 5, 0, cases).keys.shape == (5, 768)
    with pytest.raises(xpatch.XpatchError, match="no such width"):
        model_patches.case_for(64, 5, 0, cases)


def test_which_row_a_head_reads():
    import transformers

    one = tiny("bert-base")
    ids = torch.randint(10, 100, (1, 8))
    assert model_patches.read_row(one.make(0), one, ids) == 0
    decoder = tiny("gpt2")
    config = transformers.GPT2Config(**{**GPT2, "pad_token_id": 0})
    assert model_patches.read_row(transformers.GPT2ForSequenceClassification(config).eval(), decoder, ids) == -1
    with pytest.raises(xpatch.XpatchError, match="found neither|found both"):
        model_patches.read_row(decoder.make(0), decoder, ids)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama-1b"])
def test_a_step_is_the_last_row_of_the_whole_and_leaves_its_cache(name):
    model = tiny(name).make(0)
    ids = model_shapes.random_ids(model, 2, 7, 0)
    call = model_shapes.step(model, ids)(model)
    whole = model(input_ids=ids).logits[:, -1:]
    for _ in range(3):
        torch.testing.assert_close(call(), whole, atol=1e-4, rtol=1e-4)


def test_unknown_names(run):
    with pytest.raises(xpatch.XpatchError, match="no shape is called"):
        run(models=["bert-huge"])


def test_measured_chooses_its_repeats():
    turns = iter(range(1000))
    times, repeats, first = latency.measured({"quick": lambda: next(turns)}, budget_s=10.0)
    assert repeats == latency.MOST and set(times) == {"quick"} and first == {"quick": 0}
    assert latency.measured({"quick": lambda: None}, budget_s=0.0)[1] == 15
    assert latency.measured({"quick": lambda: None}, 17)[1] == 17


def test_the_baseline_holds_ratios():
    known = {"isa": native.info().get("isa"), "kernel": {"a": 0.1}, "latency": {"b": 1.0}}

    def check(case, part, *found, known=known):
        ratios = iter(found)
        return baseline.check(case, part, lambda: next(ratios), known)

    assert check("a", "kernel", 0.19) == 0.19
    assert check("a", "kernel", 0.9, 0.3, 0.2) == 0.2  # noise passes
    with pytest.raises(xpatch.BackendError, match=r"by the baseline 0.1\), found 0.21, 0.4, 0.3"):
        check("a", "kernel", 0.21, 0.4, 0.3)
    with pytest.raises(xpatch.BackendError, match="by dense PyTorch"):
        check("new", "kernel", *[1.6] * 3)
    assert check("a", "kernel", 1.2, known={**known, "isa": "another"}) == 1.2
    assert check("new", "latency", 9.0) == 9.0
    with pytest.raises(xpatch.BackendError, match="case b"):
        check("b", "latency", *[2.1] * 3)


def test_the_cases_of_make_bench(drawn_cases):
    loaded = baseline.patches("default", drawn_cases, 50, 16)
    assert 0 < baseline.ratio(baseline.kernel_calls(loaded, 32), "kernel", "dense")
    calls = baseline.latency_calls(1, 6, drawn_cases, **TINY["bert-base"])
    assert 0 < baseline.ratio(calls, "patched", "unpatched")
