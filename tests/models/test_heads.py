from __future__ import annotations

import pytest
import torch

from xpatch.errors import MismatchError
from xpatch.models import capture, head_of

CLASSIFIERS = ("bert", "xlm-r", "distilbert", "gpt2")


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_tail_of_the_captured_rows_gives_the_logits(tiny, token_ids, family):
    model = tiny(family, num_labels=3)
    ids, attention = token_ids.clone(), torch.ones_like(token_ids)
    ids[1, 5:], attention[1, 5:] = model.config.pad_token_id, 0
    inputs = {"input_ids": ids, "attention_mask": attention}
    features = capture(model, inputs)
    head = head_of(model)
    with torch.no_grad():
        torch.testing.assert_close(features.logits, model(**inputs).logits, rtol=0, atol=0)
        torch.testing.assert_close(head.tail(features.base, features.residual), features.logits, rtol=0, atol=1e-5)
    assert head.labels == 3
    for rows in (features.x, features.base, features.residual):
        assert rows.shape == (3, 32)


@pytest.mark.parametrize("family, kind", [("mixtral", "Mixtral"), ("gpt-oss", "GptOss")])
def test_a_mixture_of_experts_before_the_head(tiny, token_ids, family, kind):
    """The whole block is the FFN, also where it returns its choice of experts beside its output."""
    hf = pytest.importorskip("transformers")
    model = getattr(hf, f"{kind}ForSequenceClassification")(tiny(family, num_labels=3).config).eval()
    features = capture(model, {"input_ids": token_ids})
    with torch.no_grad():
        tail = head_of(model).tail(features.base, features.residual)
    torch.testing.assert_close(tail, features.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_gradients_reach_the_ffn_output(tiny, token_ids, family):
    model = tiny(family)
    features = capture(model, {"input_ids": token_ids})
    base = features.base.requires_grad_()
    head_of(model).tail(base, features.residual).sum().backward()
    assert base.grad is not None and bool((base.grad != 0).any())


def test_capture_changes_nothing(tiny, token_ids):
    model = tiny("bert").train()
    model.dropout.eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    first, second = capture(model, {"input_ids": token_ids}), capture(model, {"input_ids": token_ids})
    assert torch.equal(first.logits, second.logits)  # no dropout
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_last_token_is_the_last_that_is_not_padding(tiny):
    head = head_of(tiny("gpt2"))
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert head.read_rows(hidden, mask).tolist() == [hidden[0, 1].tolist(), hidden[1, 2].tolist()]
    assert torch.equal(head.read_rows(hidden), hidden[:, -1])


def test_unknown_heads_are_named(tiny, token_ids):
    with pytest.raises(
        MismatchError, match=r"BertForMaskedLM is not a sequence classifier.*found bert \(BertModel\), cls"
    ):
        head_of(tiny("bert-mlm"))
    with pytest.raises(MismatchError, match="rows are captured at the final FFN"):
        capture(tiny("bert"), {"input_ids": token_ids}, "bert.encoder.layer.0")
