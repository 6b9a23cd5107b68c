"""Decoders and encoder-decoders as ONNX graphs with a cache: the same logits, token by token, and the same generated text."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import xpatch
from tests.exporters.conftest import close, lowrank, masks, neurons
from xpatch.exporters import Session, export_adapter, export_base, read_base
from xpatch.models.anatomy import final_ffn

DECODERS = [
    "gpt2-lm", "bloom", "opt", "xglm", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "falcon",
    "gpt-neox", "gptj", "starcoder2", "cohere", "olmo2", "granite", "smollm3",
]  # fmt: skip
ENCODER_DECODERS = ["t5", "mt5", "umt5", "bart", "mbart", "m2m100", "marian", "pegasus"]


def built(family, tiny):
    torch.manual_seed(0)
    model = tiny(family)
    for parameter in model.parameters():  # random models answer alike to everything
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 98, 0
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> model and exported base; each made once."""
    known = {}

    def make(family, tiny, **options):
        if family not in known:
            model = built(family, tiny)
            folder = tmp_path_factory.mktemp("onnx") / family
            export_base(model, folder, **options)
            known[family] = SimpleNamespace(model=model, folder=folder, ffn=final_ffn(model))
        return known[family]

    return make


def patched(ffn, scale=0.5):
    return xpatch.PatchSet(
        parts={
            "n": neurons(ffn.name, 6, mask="m", scale=scale),
            "d": lowrank(ffn.down, 2, inside=ffn.inner if hasattr(ffn, "inner") else 64),
        },
        masks={"m": masks("en", "zh")},
        name="fixes",
    )


def prompts(rows=3, tokens=6, padding=2):
    ids = torch.randint(5, 98, (rows, tokens))
    mask = torch.ones_like(ids)
    ids[-1, :padding], mask[-1, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


ROWS = xpatch.Rows(patches=["fixes", "__base__", None], languages=["zh", "en", "xx"])


def stepped(session, inputs, first, **options):
    """Logits of a decoder in two calls, the second with the first one's cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    one = session.run({"input_ids": ids[:, :first], "attention_mask": mask[:, :first]}, **options)
    past = {name.replace("present", "past_key_values"): value for name, value in one.items() if name != "logits"}
    two = session.run({"input_ids": ids[:, first:], "attention_mask": mask, **past}, **options)
    return np.concatenate([one["logits"], two["logits"]], axis=1)


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[] if one in ("gpt2-lm",) else pytest.mark.slow) for one in DECODERS]
)
def test_decoders(family, made, tiny):
    one = made(family, tiny)
    base = read_base(one.folder)
    assert base.kind == "decoder" and base.outputs[:3] == ("logits", "present.0.key", "present.0.value")
    patches, inputs = patched(one.ffn), prompts()
    session = Session(one.folder, patches, threads=1)
    real = inputs["attention_mask"].bool().numpy()
    xpatch.apply(one.model, patches, name="fixes")
    try:
        from xpatch.exporters.calls import positions, takes_positions

        known = {"position_ids": positions(inputs["attention_mask"], 6)} if takes_positions(one.model) else {}
        with torch.no_grad():
            expected = one.model(**inputs, **known, xpatch=ROWS).logits.numpy()
            bare = one.model(**inputs, **known, xpatch=xpatch.Rows(patches="__base__")).logits.numpy()
            text = one.model.generate(**inputs, max_new_tokens=7, do_sample=False, xpatch=ROWS).numpy()
        assert np.abs(expected - bare).max() > 1e-2
        assert close(session.run(inputs, xpatch=ROWS)["logits"][real], expected[real])
        assert close(stepped(session, inputs, 4, xpatch=ROWS)[real], expected[real])
        assert close(session.run(inputs, xpatch=xpatch.Rows(patches="__base__"))["logits"][real], bare[real])
        assert np.array_equal(session.generate(inputs, max_new_tokens=7, xpatch=ROWS), text)
    finally:
        xpatch.remove(one.model)


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[] if one in ("mt5",) else pytest.mark.slow) for one in ENCODER_DECODERS]
)
def test_encoder_decoders(family, made, tiny):
    one = made(family, tiny)
    base = read_base(one.folder)
    assert base.kind == "encoder-decoder" and set(base.graphs) == {"encoder", "decoder"}
    patches, inputs = patched(one.ffn), prompts(padding=0)
    inputs["attention_mask"][-1, 4:] = 0
    said = torch.randint(5, 98, (3, 5))
    session = Session(one.folder, patches, threads=1)
    xpatch.apply(one.model, patches, name="fixes")
    try:
        with torch.no_grad():
            expected = one.model(**inputs, decoder_input_ids=said, xpatch=ROWS).logits.numpy()
            bare = one.model(**inputs, decoder_input_ids=said, xpatch=xpatch.Rows(patches="__base__")).logits.numpy()
            text = one.model.generate(**inputs, max_new_tokens=7, do_sample=False, num_beams=1, xpatch=ROWS).numpy()
        assert np.abs(expected - bare).max() > 1e-2
        found = session.run({**inputs, "decoder_input_ids": said}, xpatch=ROWS)
        assert close(found["logits"], expected)
        past = {name.replace("present", "past_key_values"): found[name] for name in found if ".encoder." in name}
        again = {"attention_mask": inputs["attention_mask"], "decoder_input_ids": said}
        assert close(session.run({**again, **past}, xpatch=ROWS)["logits"], expected)  # the text is not read again
        bare_rows = xpatch.Rows(patches="__base__")
        assert close(session.run({**inputs, "decoder_input_ids": said}, xpatch=bare_rows)["logits"], bare)
        assert np.array_equal(session.generate(inputs, max_new_tokens=7, xpatch=ROWS), text)
    finally:
        xpatch.remove(one.model)


def test_a_text_is_finished_with_the_sets_it_began_with(made, tiny, monkeypatch):
    one = made("gpt2-lm", tiny)
    session, inputs = Session(one.folder, patched(one.ffn, scale=2.0), threads=1), prompts()
    expected = session.generate(inputs, max_new_tokens=6, xpatch=xpatch.Rows(languages="en"))
    bare = session.generate(inputs, max_new_tokens=6, xpatch=xpatch.Rows(patches="__base__"))
    assert not np.array_equal(expected, bare)
    step = Session.step

    def removed_meanwhile(self, *args):
        found = step(self, *args)
        self.remove()
        return found

    monkeypatch.setattr(Session, "step", removed_meanwhile)
    assert np.array_equal(session.generate(inputs, max_new_tokens=6, xpatch=xpatch.Rows(languages="en")), expected)
    assert session.status().names == ()


@pytest.mark.slow
def test_slots_in_both_graphs_and_an_adapter(tiny, tmp_path):
    model = built("t5", tiny)
    first = "encoder.block.1.layer.1.DenseReluDense"
    export_base(model, tmp_path / "onnx", sites=[first, final_ffn(model).name])
    base = read_base(tmp_path / "onnx")
    assert {slot.graph for slot in base.slots} == {"encoder", "decoder"}
    patches = xpatch.PatchSet(parts={"a": neurons(first, 5), "b": neurons(final_ffn(model).name, 4)}, name="fixes")
    export_adapter(patches, tmp_path / "onnx", tmp_path / "fixes.onnx_adapter")
    session = Session(tmp_path / "onnx", tmp_path / "fixes.onnx_adapter")
    inputs, said = prompts(padding=0), torch.randint(5, 98, (3, 5))
    xpatch.apply(model, patches)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=said).logits.numpy()
    assert close(session.run({**inputs, "decoder_input_ids": said})["logits"], expected)
    cross = "decoder.block.0.layer.1.EncDecAttention.k"
    xpatch.remove(model)
    with pytest.raises(xpatch.MismatchError, match="not computed by the graph 'decoder'"):
        export_base(model, tmp_path / "other", linears=[cross])


def test_bad_inputs_are_named(made, tiny):
    one = made("gpt2-lm", tiny)
    session, inputs = Session(one.folder), prompts()
    with pytest.raises(xpatch.MismatchError, match="pad them on the left"):
        mask = inputs["attention_mask"].flip(1)
        session.generate({**inputs, "attention_mask": mask})
    with pytest.raises(
        xpatch.MismatchError, match=r"attention_mask: expected \[3, 6\], cached tokens included, found \[3, 4\]"
    ):
        session.run({**inputs, "attention_mask": torch.ones(3, 4)})
    with pytest.raises(
        xpatch.MismatchError, match=r"a cache has 4 tensors, found 1; past_key_values.0.value is missing"
    ):
        session.run({**inputs, "past_key_values.0.key": np.zeros((3, 4, 2, 8))})
    past = {
        f"past_key_values.{layer}.{kind}": np.zeros((3, 4, 2, 8)) for layer in range(2) for kind in ("key", "value")
    }
    with pytest.raises(
        xpatch.MismatchError, match=r"past_key_values.1.value: expected \[3, 4, 2, 8\] .*found \[3, 4, 3, 8\]"
    ):
        session.run({"input_ids": inputs["input_ids"], **past, "past_key_values.1.value": np.zeros((3, 4, 3, 8))})
    with pytest.raises(xpatch.MismatchError, match="unknown inputs token_type_ids"):
        session.run({**inputs, "token_type_ids": inputs["input_ids"]})
    long = {
        f"past_key_values.{layer}.{kind}": np.zeros((1, 4, 1023, 8)) for layer in range(2) for kind in ("key", "value")
    }
    limit = read_base(one.folder).max_tokens
    past = {name: np.zeros((1, 4, limit - 1, 8)) for name in long}
    with pytest.raises(
        xpatch.MismatchError, match=f"2 tokens behind {limit - 1} in the cache, expected at most {limit}"
    ):
        session.run({"input_ids": np.ones((1, 2)), **past})


@pytest.mark.slow
def test_a_state_that_is_not_keys_and_values_is_refused(tiny, tmp_path):
    with pytest.raises(xpatch.MismatchError, match="cannot be exported"):
        export_base(tiny("jamba"), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(tiny, tmp_path):
    """MPT cuts its distances at a length that depends on the past."""
    with pytest.raises(xpatch.BackendError, match="could not export MptForCausalLM .*inconsistent"):
        export_base(tiny("mpt"), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
