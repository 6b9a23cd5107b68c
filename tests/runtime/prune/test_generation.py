"""Optimised language models: the tokens of the full model, from the last row of each step's last layer."""

from __future__ import annotations

import copy

import pytest
import torch

import xpatch

DECODERS = (
    "gpt2-lm", "gpt-bigcode", "gptj", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "falcon",
    "falcon-new", "gpt-neox", "starcoder2", "stablelm", "cohere", "cohere2", "olmo2", "glm4", "nemotron", "granite", "smollm3",
    "persimmon",
)  # fmt: skip
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_kept_logits_and_greedy_tokens_of_the_full_model(lively, token_ids, near, seen_by, bare, family):
    model = lively(family)
    base = copy.deepcopy(model)
    xpatch.optimize(model)
    ids, mask = token_ids.clone(), torch.ones_like(token_ids)
    ids[1, :3], mask[1, :3] = 0, 0
    for keep, rows in ((1, 1), (3, 3), (7, 7), (20, 7), (0, 7), (torch.tensor([2, -1]), 2)):
        with seen_by(model) as seen:
            near(
                model(ids, attention_mask=mask, logits_to_keep=keep).logits,
                base(ids, attention_mask=mask, logits_to_keep=keep).logits,
            )
        assert seen == [(3, rows, 32)]
    assert torch.equal(model(ids, labels=ids, logits_to_keep=0).loss, base(ids, labels=ids, logits_to_keep=0).loss)
    with seen_by(model) as seen:
        found = model.generate(ids, attention_mask=mask, **GREEDY)
    assert seen == [(3, 1, 32)] * 5
    assert torch.equal(found, base.generate(ids, attention_mask=mask, **GREEDY))
    xpatch.optimize(model, off=True)
    assert bare(model)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2-lm", "llama", "mistral"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2, "one": True},
        {"prefill_chunk_size": 3},
    ],
    ids=["beams", "sequences", "no cache", "static cache", "assisted", "chunks"],
)
def test_other_ways_to_generate(lively, token_ids, patch_of, family, options):
    model = lively(family, **({"sliding_window": 4} if family == "mistral" else {}))
    options = {**GREEDY, **options, "disable_compile": True}
    ids = token_ids[:1] if options.pop("one", False) else token_ids
    base = copy.deepcopy(model)
    for one in (base, model):
        xpatch.apply(one, patch_of(one, "neurons"), name="a")
    xpatch.optimize(model)
    options["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))


@torch.no_grad()
def test_the_cache_holds_every_token(lively, token_ids):
    model = lively("llama")
    base = copy.deepcopy(model)
    xpatch.optimize(model)
    found = model(token_ids, logits_to_keep=1, use_cache=True).past_key_values
    expected = base(token_ids, logits_to_keep=1, use_cache=True).past_key_values
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    step = token_ids[:, :1]
    assert torch.equal(model(step, past_key_values=found).logits, base(step, past_key_values=expected).logits)


@torch.no_grad()
def test_positions_under_gradients_and_two_axes_are_computed_in_full(lively, token_ids, seen_by):
    model = xpatch.optimize(lively("llama"))
    with seen_by(model) as seen:
        with torch.enable_grad():
            model(token_ids, logits_to_keep=torch.tensor([1, 1]))
        model(token_ids, logits_to_keep=torch.tensor([[0, 1]] * 3))
        model(token_ids, logits_to_keep=torch.ones(7, dtype=torch.bool))
        model(token_ids)
    assert seen == [(3, 7, 32)] * 4


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([1, 4])])
def test_patches_beside_the_attention_join_the_rows_they_were_given(lively, token_ids, near, keep):
    model = lively("llama")
    parts = {
        name: xpatch.LowRankDelta(f"model.layers.1.self_attn.{name}_proj", torch.randn(2, 32) / 6, torch.randn(32, 2))
        for name in "qkvo"
    }
    full = xpatch.apply(copy.deepcopy(model), xpatch.PatchSet(parts))
    xpatch.apply(
        xpatch.optimize(model), xpatch.PatchSet(parts)
    )  # its hooks come later, and still before the rows are spread
    near(model(token_ids, logits_to_keep=keep).logits, full(token_ids, logits_to_keep=keep).logits)
