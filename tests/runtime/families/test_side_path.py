"""Every family of models people serve: patches beside any layer, against the same maths written out beside a float64 copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xpatch
from xpatch import DenseDelta, LowRankDelta, PatchSet, Rows
from xpatch.models.anatomy import find_ffn_sites
from xpatch.models.linears import linears

DELTAS = ("lowrank", "dense", "dense-no-bias")
COMMON = (
    "bert", "bert-mlm", "xlm-r", "distilbert-mlm", "modernbert-mlm", "electra", "mdeberta", "albert", "xlm", "t5", "mt5", "bart",
    "gpt2-lm", "bloom", "opt", "llama", "qwen3", "gemma2", "gemma3", "gemma3-vision", "phi", "phi3", "falcon", "gpt-neox",
)  # fmt: skip
RARE = (
    "roberta", "xlm-r-mlm", "xlm-r-xl", "distilbert", "modernbert", "eurobert", "deberta-v2", "mpnet", "convbert", "flaubert",
    "umt5", "mbart", "m2m100", "marian", "pegasus", "gpt2", "gpt-bigcode", "gptj", "xglm", "mistral", "qwen2", "gemma", "falcon-new",
    "starcoder2", "stablelm", "cohere", "cohere2", "olmo2", "glm4", "mpt", "nemotron", "granite", "smollm3", "persimmon",
)  # fmt: skip
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "llama4", "deepseek-v3")
RARE_EXPERTS = ("olmoe", "granite-moe", "jetmoe", "phimoe", "nllb-moe", "switch", "jamba")
EVERY_FORM = ("bert", "t5", "gpt2-lm", "llama", "phi3", "falcon")  #: in the fast tier; the others in the slow one
DEEP = (
    "bert", "modernbert-mlm", "albert", "xlm", "t5", "bart", "gpt2-lm", "llama", "gemma3-vision", "falcon", "deepseek-v3",
)  # fmt: skip


def tiers(common: tuple[str, ...], rare: tuple[str, ...]) -> list[Any]:
    return [*common, *(pytest.param(family, marks=pytest.mark.slow) for family in rare)]


def inputs_for(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize("family, form", [
    *((family, "neurons") for family in COMMON),
    *((family, form) for family in EVERY_FORM for form in DELTAS),
    *(pytest.param(family, "neurons", marks=pytest.mark.slow) for family in RARE),
    *(pytest.param(family, form, marks=pytest.mark.slow) for family in (*COMMON, *RARE) if family not in EVERY_FORM for form in DELTAS),
])  # fmt: skip
@torch.no_grad()
def test_side_path(tiny, token_ids, patch_of, side_path, check, family, form):
    model = tiny(family)
    patches = patch_of(model, form)
    check(model, patches, side_path(model, patches), inputs_for(model, token_ids))


@pytest.mark.parametrize("family", tiers(EXPERTS, RARE_EXPERTS))
@torch.no_grad()
def test_neurons_beside_a_whole_mixture_of_experts(tiny, token_ids, patch_of, side_path, check, family):
    model = tiny(family)
    site = find_ffn_sites(model)[-1]
    assert site.kind == "experts" and site.experts == 4
    patches = patch_of(model, "neurons")
    check(model, patches, side_path(model, patches), inputs_for(model, token_ids))
    xpatch.apply(model, patches, name="here")
    inputs = inputs_for(model, token_ids)
    patched = model(**inputs).logits
    with xpatch.disabled(model):
        base = model(**inputs).logits
    mixed = model(**inputs, xpatch=Rows(patches=["here", "__base__", "here"])).logits
    assert torch.equal(mixed[1], base[1]) and torch.equal(mixed[0], patched[0]) and torch.equal(mixed[2], patched[2])


@pytest.mark.parametrize("family", DEEP)
@torch.no_grad()
def test_any_layer(tiny, token_ids, patch_of, side_path, check, family):
    """Each of three layers, in both stacks of an encoder-decoder, and in a vision tower that this input does not reach."""
    model = tiny(family, layers=3)
    inputs = inputs_for(model, token_ids)
    for index, site in enumerate(find_ffn_sites(model)):
        if site.stack == "vision":
            continue
        patches = patch_of(model, "neurons", layer=index, seed=index)
        twin = side_path(model, patches)
        check(model, patches, twin, inputs)


@torch.no_grad()
def test_a_vision_tower_can_be_patched_too(tiny, token_ids, patch_of, side_path, assert_same):
    model = tiny("gemma3-vision")
    model.model.multi_modal_projector.mm_input_projection_weight.normal_()  # starts at zero, which hides the tower
    ids = token_ids.clone()
    ids[:, 1:5] = model.config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 28, 28)}
    assert find_ffn_sites(model)[0].stack == "vision"
    patches = patch_of(model, "neurons", layer=0)
    twin = side_path(model, patches)
    base = model(**inputs).logits
    expected = twin(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits
    served = xpatch.apply(model, patches)(**inputs).logits
    assert_same(served, expected, base)


def merged(twin: nn.Module, patches: PatchSet) -> nn.Module:
    """`twin` with every delta added into the weights it stands beside (a tied weight is untied first)."""
    for part in patches.parts.values():
        layer: Any = twin.get_submodule(part.site)
        if isinstance(part, LowRankDelta):
            delta, bias = part.up @ part.down, None
        else:
            delta, bias = part.weight, part.bias.to(layer.weight.dtype)
        layer.weight = nn.Parameter(layer.weight + (delta.t() if type(layer).__name__ == "Conv1D" else delta))
        if bias is not None:
            layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias)
    return twin


@pytest.mark.parametrize("family", tiers((*COMMON, *EXPERTS), (*RARE, *RARE_EXPERTS)))
@torch.no_grad()
def test_deltas_beside_any_linear(tiny, token_ids, assert_same, twin_of, family):
    """Attention's q, k, v, o (fused or not), up, gate, down, heads: each one matters, and all together are the merged weights."""
    model = tiny(family)
    inputs = inputs_for(model, token_ids)
    base = model(**inputs).logits
    found = [item for item in linears(model) if "vision" not in item.name and "multi_modal" not in item.name]
    called: set[str] = set()
    handles = [item.module.register_forward_hook(lambda *ignored, name=item.name: called.add(name)) for item in found]
    model(**inputs)
    for handle in handles:
        handle.remove()
    assert [item.name for item in found if item.name not in called and "expert" not in item.name] == []
    found = [item for item in found if item.name in called]  # no token may have chosen an expert
    assert len(found) >= 4
    parts: dict[str, Any] = {}
    for index, (name, _, inside, outside) in enumerate(found):
        if index % 2:
            parts[name] = LowRankDelta(name, 0.2 * torch.randn(2, inside), 0.2 * torch.randn(outside, 2))
        else:
            parts[name] = DenseDelta(name, 0.05 * torch.randn(outside, inside), 0.05 * torch.randn(outside))
    everywhere = PatchSet(parts=parts)
    expected = merged(twin_of(model), everywhere)(**inputs).logits
    served = xpatch.apply(model, everywhere, name="here")(**inputs).logits
    assert_same(served, expected, base)
    assert torch.equal(xpatch.remove(model)(**inputs).logits, base)


@pytest.mark.parametrize("family", ["gpt2-lm", "llama", "t5", "mbart", "mixtral"])
@torch.no_grad()
def test_generated_text_is_the_side_paths(tiny, token_ids, patch_of, side_path, family):
    model = tiny(family)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(token_ids), "pad_token_id": 0}
    base = model.generate(token_ids, **options)
    patches = patch_of(model, "neurons")
    twin = side_path(model, patches)
    expected = twin.generate(token_ids, **options)
    served = xpatch.apply(model, patches).generate(token_ids, **options)
    assert torch.equal(served, expected) and not torch.equal(served, base)


@pytest.mark.parametrize("family", ["bert", "albert", "xlm"])
@torch.no_grad()
def test_a_chunked_ffn_is_patched_in_every_chunk(tiny, token_ids, patch_of, side_path, check, family):
    """`chunk_size_feed_forward` runs up and down once per chunk of tokens."""
    model = tiny(family, chunk_size_feed_forward=2)
    ids = token_ids[:, :6]
    patches = patch_of(model, "neurons")
    check(model, patches, side_path(model, patches), {"input_ids": ids})
    base = model(ids).logits
    xpatch.apply(model, patches, name="here")
    mixed = model(ids, xpatch=Rows(patches=["here", "__base__", "here"])).logits
    assert torch.equal(mixed[1], base[1]) and torch.equal(mixed[0], model(ids).logits[0])


@torch.no_grad()
def test_torchs_own_transformer(patch_of, side_path, assert_same):
    """nn.TransformerEncoder leaves its fused fast path once a hook is up."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)

    model, x = Encoder().eval(), torch.randn(3, 7, 32)
    base = model(x)
    patches = patch_of(model, "neurons")
    expected = side_path(model, patches)(x.double())
    served = xpatch.apply(model, patches)(x)
    assert_same(served, expected, base)
    assert torch.equal(xpatch.remove(model)(x), base)


@torch.no_grad()
def test_bert_to_bert(tiny, token_ids, patch_of, side_path, check):
    """A pair of models in one: sites are found in both, named by the stack they lie in."""
    import transformers as hf

    decoder = tiny("bert-mlm", is_decoder=True, add_cross_attention=True)
    decoder = hf.BertLMHeadModel(decoder.config).eval()
    model = hf.EncoderDecoderModel(encoder=tiny("bert").bert, decoder=decoder)
    sites = find_ffn_sites(model)
    assert [site.stack for site in sites] == ["encoder", "encoder", "decoder", "decoder"]
    inputs = {"input_ids": token_ids, "decoder_input_ids": token_ids}
    for layer in (0, 3):
        patches = patch_of(model, "neurons", layer=layer)
        check(model, patches, side_path(model, patches), inputs)
