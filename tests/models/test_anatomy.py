from __future__ import annotations

import pytest
import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import ffn_site, final_ffn, find_ffn_sites


@pytest.mark.parametrize(
    "family, name, up, down, gate, activation",
    [
        ("bert", "bert.encoder.layer.1", "intermediate.dense", "output.dense", None, "gelu"),
        ("bert-mlm", "bert.encoder.layer.1", "intermediate.dense", "output.dense", None, "gelu"),
        ("xlm-r", "roberta.encoder.layer.1", "intermediate.dense", "output.dense", None, "gelu"),
        ("gpt2", "transformer.h.1.mlp", "c_fc", "c_proj", None, "gelu_tanh"),
        ("gpt2-lm", "transformer.h.1.mlp", "c_fc", "c_proj", None, "gelu_tanh"),
        ("distilbert", "distilbert.transformer.layer.1.ffn", "lin1", "lin2", None, "gelu"),
        ("opt", "model.decoder.layers.1", "fc1", "fc2", None, "relu"),
        ("llama", "model.layers.1.mlp", "up_proj", "down_proj", "gate_proj", "silu"),
    ],
)
def test_sites_of_the_families(tiny, family, name, up, down, gate, activation):
    model = tiny(family)
    sites = find_ffn_sites(model)
    assert [site.layer for site in sites] == [0, 1]
    site = sites[-1]
    assert site == final_ffn(model) == ffn_site(model, name)
    assert (site.name, site.up, site.down) == (name, f"{name}.{up}", f"{name}.{down}")
    assert site.gate == (f"{name}.{gate}" if gate else None)
    assert (site.activation, site.width, site.inner) == (activation, 32, 64)


@pytest.mark.parametrize(
    "family, count, last, kind, stack",
    [
        ("t5", 4, "decoder.block.1.layer.2.DenseReluDense", "plain", "decoder"),
        ("mt5", 4, "decoder.block.1.layer.2.DenseReluDense", "gated", "decoder"),
        ("bart", 4, "model.decoder.layers.1", "plain", "decoder"),
        ("modernbert", 2, "model.layers.1.mlp", "gated", "encoder"),
        # Attention whose q and o have the shapes of an FFN, and one linear that holds gate and up.
        ("gemma2", 2, "model.layers.1.mlp", "gated", "decoder"),
        ("phi3", 2, "model.layers.1.mlp", "gated", "decoder"),
        ("bloom", 2, "transformer.h.1.mlp", "plain", "decoder"),
        ("gemma3-vision", 3, "model.language_model.layers.1.mlp", "gated", "decoder"),
        ("mixtral", 2, "model.layers.1.mlp", "experts", "decoder"),
        ("qwen2-moe", 2, "model.layers.1.mlp", "experts", "decoder"),  # not its shared expert, whose output is scaled
    ],
)
def test_more_shapes_of_ffn(tiny, family, count, last, kind, stack):
    sites = find_ffn_sites(tiny(family))
    assert len(sites) == count
    assert (sites[-1].name, sites[-1].kind, sites[-1].stack) == (last, kind, stack)
    assert [site.family for site in sites] == [None] * count


def test_a_mixture_of_experts_is_one_ffn(tiny):
    """The place for patches is the block as a whole; sizes are read from the router and the experts."""
    for family, inner in (("mixtral", 64), ("qwen3-moe", 16), ("jetmoe", 64), ("switch", 64)):
        site = find_ffn_sites(tiny(family))[-1]
        assert site.up == site.down == site.name and site.gate is None
        assert (site.width, site.inner, site.experts, site.activation in ("silu", "relu")) == (32, inner, 4, True)
    dense, sparse = find_ffn_sites(tiny("deepseek-v3"))
    assert (dense.kind, sparse.kind) == ("gated", "experts")


def test_layers_of_one_list_may_differ(tiny):
    """Jamba: a recurrence in one layer, attention in the next; both have an FFN."""
    sites = find_ffn_sites(tiny("jamba"))
    assert [(site.layer, site.kind) for site in sites] == [(0, "gated"), (1, "experts")]


def test_the_final_ffn_is_not_in_a_vision_tower(tiny):
    model = tiny("gemma3-vision")
    assert [site.stack for site in find_ffn_sites(model)] == ["vision", "decoder", "decoder"]
    model.add_module("vision_again", model.model.vision_tower)
    model.model.vision_tower = nn.Identity()
    assert find_ffn_sites(model)[-1].stack == "vision"
    assert final_ffn(model).name == "model.language_model.layers.1.mlp"


@pytest.mark.parametrize(
    "family", ["bert", "albert", "xlm", "t5", "bloom", "llama", "gemma3-vision", "mixtral", "llama4"]
)
def test_no_weights_are_needed(tiny, family):
    """A model on the meta device shows the same sites: a large folder can be inspected on a small machine."""
    with torch.device("meta"):
        empty = tiny(family)
        inside = find_ffn_sites(empty)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert find_ffn_sites(empty) == inside == find_ffn_sites(tiny(family))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("relu", "relu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("silu", "silu"),
        ("quick_gelu", "quick_gelu"),
    ],
)
def test_activation_is_recognised_by_its_values(tiny, name, expected):
    assert final_ffn(tiny("bert", hidden_act=name)).activation == expected


def test_no_ffn_says_what_was_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(MismatchError, match=r"no FFN was found in Sequential.*0 4->4"):
        find_ffn_sites(model)


def test_a_model_without_ffns_says_what_it_has(tiny):
    with pytest.raises(
        MismatchError, match=r"no FFN was found in MambaForCausalLM.*module lists backbone.layers.*in_proj 32->"
    ):
        find_ffn_sites(tiny("mamba"))


def test_loose_experts_have_no_single_site():
    """Experts held by the layer itself: there is no module whose output is the mixture's."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.Linear(4, 4)
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)])

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    with pytest.raises(MismatchError, match="no FFN was found"):
        find_ffn_sites(model)


def test_wrong_names_list_what_there_is(tiny):
    model = tiny("bert")
    with pytest.raises(
        MismatchError,
        match=r"no FFN named 'encoder'; it has bert.encoder.layer.0, bert.encoder.layer.1. `xpatch inspect",
    ):
        ffn_site(model, "encoder")
    with pytest.raises(MismatchError, match=r"layer.9, .*layer.19, .*and 22 more"):
        ffn_site(tiny("bert", layers=30), "bert.encoder.layers.9")
