"""Heads of language models: the tail found by watching a forward gives the model's own logits, whatever the FFN's output becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xpatch.errors import MismatchError
from xpatch.models.lm_heads import capture_tokens, lm_head_of, lm_kind
from xpatch.models.tails import factor_between

# family -> its configuration's specialities: bias, factors, caps, norms behind the FFN, parallel attention, flat tokens, mixtures
FAMILIES: dict[str, dict[str, Any]] = {
    "bart": {}, "mbart": {}, "marian": {}, "t5": {}, "mt5": {"is_gated_act": True, "feed_forward_proj": "gated-gelu"},
    "gpt2-lm": {}, "gptj": {}, "bloom": {"apply_residual_connection_post_layernorm": True}, "opt": {}, "llama": {}, "qwen2": {}, "falcon": {},
    "gemma2": {"final_logit_softcapping": 2.0}, "cohere": {"logit_scale": 0.25}, "olmo2": {}, "mixtral": {},
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 4.0},
    "bert-mlm": {}, "xlm-r-mlm": {}, "distilbert-mlm": {}, "modernbert-mlm": {}, "mdeberta": {},
}  # fmt: skip


def inputs_for(model: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 99, (2, 6), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 99, (2, 4), generator=draw)
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_follows_a_moved_output(tiny: Callable[..., Any], family: str) -> None:
    model = tiny(family, **FAMILIES[family])
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    inputs, kind = inputs_for(model), lm_kind(model)
    assert kind is not None
    head = lm_head_of(model, inputs, kind)
    assert head.vocabulary == 100 and head.kind == kind
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    assert set(hooks) == {(0, 0)}
    chosen = torch.zeros(inputs.get("decoder_input_ids", inputs["input_ids"]).shape, dtype=torch.bool)
    chosen[0, 1], chosen[1, 3], chosen[1, 0] = True, True, True
    rows = capture_tokens(model, inputs, head, chosen)
    assert rows.x.shape == rows.base.shape == rows.residual.shape == (3, 32)
    move = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def moved(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + move, *output[1:]) if isinstance(output, tuple) else output + move

    for shift in (torch.zeros(32), move):
        handle = model.get_submodule(head.site.down).register_forward_hook(moved) if shift is move else None
        with torch.no_grad():
            expected = model(**inputs).logits[chosen]
            torch.testing.assert_close(head.tail(rows.base + shift, rows.residual), expected, rtol=1e-4, atol=1e-4)
        if handle is not None:
            handle.remove()


def test_kinds(tiny: Callable[..., Any]) -> None:
    found = {family: lm_kind(tiny(family)) for family in ("t5", "llama", "bert-mlm", "bert", "gpt2", "distilbert-mlm")}
    assert found == {
        "t5": "seq2seq", "llama": "causal", "bert-mlm": "masked", "bert": None, "gpt2": None, "distilbert-mlm": "masked"
    }  # fmt: skip
    assert lm_kind(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("albert", "'albert.encoder.albert_layer_groups.0.albert_layers.0' of AlbertForMaskedLM runs 2 times"),
        (
            "xlm",
            "XLMWithLMHeadModel computes after its final FFN 'transformer.ffns.1' is not known: what 'transformer.layer_norm2.1'",
        ),
    ],
)
def test_what_is_not_known_is_refused(tiny: Callable[..., Any], family: str, words: str) -> None:
    model = tiny(family)
    kind = lm_kind(model)
    assert kind is not None
    with pytest.raises(MismatchError, match=words):
        lm_head_of(model, inputs_for(model), kind)


def test_a_head_that_mixes_tokens_is_refused(tiny: Callable[..., Any]) -> None:
    """What one forward suggests is checked by a second, disturbed one."""
    model = tiny("llama")

    class Backwards(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.flip(1)

    model.model.norm = torch.nn.Sequential(model.model.norm, Backwards())
    with pytest.raises(
        MismatchError, match="moving the output of its final FFN 'model.layers.1.mlp' gives logits that differ by"
    ):
        lm_head_of(model, inputs_for(model), "causal")


def test_arithmetic_after_the_head_that_is_not_known_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits.sin()) or output)
    with pytest.raises(MismatchError, match="the logits are not what the last module gave"):
        lm_head_of(model, inputs_for(model), "causal")


def test_factor_between() -> None:
    x = torch.randn(4, 3)
    assert factor_between(x, x.clone()) == 1.0
    assert factor_between(x, x * 0.25) == pytest.approx(0.25)
    assert factor_between(x, x + 0.1) is None and factor_between(x, x[:2]) is None and factor_between(x, x * 0) is None
