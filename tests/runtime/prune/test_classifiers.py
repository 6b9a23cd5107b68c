"""Optimised sequence classifiers of every family: the answers of the full model, from one row of its last layer."""

from __future__ import annotations

import copy

import pytest
import torch

import xpatch

ENCODERS = ("bert", "xlm-r", "roberta", "electra", "distilbert")
#: Those that end in a classifier in every supported transformers.
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "gemma", "gemma2", "phi3", "starcoder2", "gpt-bigcode", "gptj")
EAGER_ONLY = ("gemma2", "gptj")

pytestmark = pytest.mark.filterwarnings("ignore:.*padding.*")


def padded(ids, side, pad):
    """The batch with its second row shorter, and its attention mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    if side is not None:
        gap = slice(4, None) if side == "right" else slice(0, 3)
        ids[1, gap], mask[1, gap] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (family, attention)
        for family in (*ENCODERS, *DECODERS)
        for attention in ("eager", *(("sdpa",) if family not in EAGER_ONLY else ()))
    ],
)
def test_answers_of_the_full_model(lively, token_ids, near, seen_by, bare, family, attention):
    model = lively(family, head="ForSequenceClassification", attn_implementation=attention)
    base = copy.deepcopy(model)
    assert xpatch.optimize(model) is model
    for ids in (token_ids, token_ids[:1]):
        for side in (None, "right", "left") if len(ids) > 1 else (None,):
            inputs = padded(ids, side, model.config.pad_token_id)
            for given in (inputs, {"input_ids": inputs["input_ids"]}):
                with seen_by(model) as seen:
                    near(model(**given).logits, base(**given).logits)
                assert set(seen) == {(len(ids), 1, 32)}
    embedded = {"inputs_embeds": torch.randn(3, 7, model.get_input_embeddings().embedding_dim)}
    if base.config.pad_token_id is not None:
        near(model(**embedded).logits, base(**embedded).logits)
    labels = torch.tensor([0, 1, 1])
    near(model(token_ids, labels=labels).loss, base(token_ids, labels=labels).loss)
    assert xpatch.optimize(model, off=True) is model and bare(model)
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_without_a_padding_token_the_last_position_is_read(lively, token_ids, near, family):
    model = lively(family, head="ForSequenceClassification")
    model.config.pad_token_id = None
    base, ids = copy.deepcopy(model), token_ids[:1].clone()
    ids[:, -2:] = 0
    near(xpatch.optimize(model)(ids).logits, base(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "starcoder2"])
def test_sliding_windows_hold_for_the_row_that_is_read(lively, token_ids, near, family, window):
    model = lively(family, head="ForSequenceClassification", sliding_window=window)
    wide = lively(family, head="ForSequenceClassification", sliding_window=100)
    wide.load_state_dict(model.state_dict())
    inputs = padded(token_ids, "right", 0)
    expected = model(**inputs).logits
    assert not torch.allclose(expected, wide(**inputs).logits, atol=1e-3)
    near(xpatch.optimize(model)(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_every_row_where_something_else_than_the_logits_is_asked_for(lively, token_ids, seen_by, family):
    model = lively(family, head="ForSequenceClassification", attn_implementation="eager")
    base = copy.deepcopy(model)
    xpatch.optimize(model)
    for asked in ("output_hidden_states", "output_attentions"):
        found, expected = model(token_ids, **{asked: True}), base(token_ids, **{asked: True})
        assert torch.equal(found.logits, expected.logits)
        for one, other in zip(found[asked[7:]], expected[asked[7:]], strict=True):
            assert torch.equal(one, other)
        setattr(model.config, asked, True)
        with seen_by(model) as seen:
            assert torch.equal(model(token_ids).logits, expected.logits)
        assert seen == [(3, 7, 32)]
        setattr(model.config, asked, False)
    assert torch.equal(model.base_model(token_ids)[0], base.base_model(token_ids)[0])
    with xpatch.disabled(model):
        assert torch.equal(model(token_ids).logits, base(token_ids).logits)
    with seen_by(model) as seen:
        model(token_ids)
        model(token_ids[:, :1])
        model.train()(token_ids)
        model.eval()(token_ids)
    assert seen == [(3, 1, 32), (3, 1, 32), (3, 7, 32), (3, 1, 32)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gpt2"])
def test_queries_and_outputs_of_attention_are_pruned_keys_and_values_are_not(lively, token_ids, seen_by, family):
    names = {
        "bert": ("bert.encoder.layer.1.attention", "self.query", "output", "self.key", "self.value"),
        "distilbert": ("distilbert.transformer.layer.1.attention", "q_lin", "out_lin", "k_lin", "v_lin"),
        "llama": ("model.layers.1.self_attn", "q_proj", "o_proj", "k_proj", "v_proj"),
        "gpt2": ("transformer.h.1.attn", None, "c_proj", "c_attn", "c_attn"),
    }[family]
    model = xpatch.optimize(lively(family, head="ForSequenceClassification"))
    for place, tokens in zip(names[1:], (1, 1, 7, 7), strict=True):
        if place is not None:
            with seen_by(model, f"{names[0]}.{place}") as seen:
                model(token_ids)
            assert seen == [(3, tokens, 32)], place
    below = f"{names[0].replace('1', '0', 1)}.{names[2]}"
    with seen_by(model, below) as seen:
        model(token_ids)
    assert seen == [(3, 7, 32)]


def test_gradients_are_those_of_the_full_model(lively, token_ids):
    for family in ("bert", "distilbert", "gpt2", "llama"):
        model = lively(family, head="ForSequenceClassification").double()
        base = copy.deepcopy(model)
        for one in (xpatch.optimize(model), base):
            one(token_ids).logits.square().sum().backward()
        for (name, found), expected in zip(model.named_parameters(), base.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-9, rtol=1e-6, msg=name)


@torch.no_grad()
def test_half_precision_autocast_and_inference_mode(lively, token_ids):
    model = lively("bert")
    base = copy.deepcopy(model)
    xpatch.optimize(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(token_ids).logits, base(token_ids).logits, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(token_ids).logits, base(token_ids).logits, atol=5e-2, rtol=5e-2)
    found, expected = model.bfloat16()(token_ids).logits, base.bfloat16()(token_ids).logits
    torch.testing.assert_close(found, expected, atol=5e-2, rtol=5e-2)
