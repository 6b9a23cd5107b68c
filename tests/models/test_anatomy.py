from __future__ import annotations

import pytest
import transformers as hf
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import ffn_site, final_ffn, find_ffn_sites, linear, linear_shape

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}


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
    "make, count, last, gated",
    [
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), 4, "decoder.block.1.layer.2.DenseReluDense", False),
        (lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)), 4, "decoder.block.1.layer.2.DenseReluDense", True),
        # Attention whose q and o have the shapes of an FFN, and one linear that holds gate and up.
        (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=16)), 2, "model.layers.1.mlp", True),
        (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)), 2, "model.layers.1.mlp", True),
    ],
)
def test_more_shapes_of_ffn(make, count, last, gated):
    sites = find_ffn_sites(make())
    assert len(sites) == count
    assert sites[-1].name == last
    assert (sites[-1].gate is not None) is gated


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


def test_experts_have_no_single_site():
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
        MismatchError, match=r"no FFN named 'encoder'; it has bert.encoder.layer.0, bert.encoder.layer.1"
    ):
        ffn_site(model, "encoder")
    with pytest.raises(
        MismatchError, match=r"no linear layer named 'bert.output.dense' \(found no such module\).*layer.1.output.dense"
    ):
        linear(model, "bert.output.dense")
    with pytest.raises(MismatchError, match="found a BertLayer"):
        linear(model, "bert.encoder.layer.0")


def test_linear_shapes_follow_the_data_not_the_weight(tiny):
    mlp = tiny("gpt2").transformer.h[0].mlp
    assert linear_shape(mlp.c_fc) == (32, 64)
    assert linear_shape(mlp.c_proj) == (64, 32)
    assert linear_shape(nn.LayerNorm(4)) is None
