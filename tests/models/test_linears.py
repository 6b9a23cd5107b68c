from __future__ import annotations

import pytest
import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import find_ffn_sites
from xpatch.models.linears import linear, linear_shape, linears


def test_shapes_follow_the_data_not_the_weight(tiny):
    mlp = tiny("gpt2").transformer.h[0].mlp
    assert linear_shape(mlp.c_fc) == (32, 64)
    assert linear_shape(mlp.c_proj) == (64, 32)
    assert linear_shape(nn.LayerNorm(4)) is None


def test_wrong_names_list_the_nearest(tiny):
    model = tiny("bert")
    with pytest.raises(
        MismatchError, match=r"no linear layer named 'bert.output.dense' \(found no such module\).*layer.1.output.dense"
    ):
        linear(model, "bert.output.dense")
    with pytest.raises(MismatchError, match="found a BertLayer"):
        linear(model, "bert.encoder.layer.0")
    with pytest.raises(MismatchError, match="no linear layer named ''"):
        linear(nn.Linear(2, 2), "")


def test_where_nothing_can_be_added_there_is_no_site(tiny):
    """A linear whose output is not its own, or whose weight is only read, would take a delta and do nothing with it."""
    moe = tiny("phimoe")
    assert isinstance(moe.model.layers[0].mlp.router, nn.Linear)
    with pytest.raises(MismatchError, match="choice of experts is made inside it"):
        linear(moe, "model.layers.0.mlp.router")
    with pytest.raises(MismatchError, match=r"experts in one parameter; patch neurons can stand beside its whole FFN"):
        linear(moe, "model.layers.0.mlp.experts")
    with pytest.raises(MismatchError, match="reads its weight without calling it"):
        linear(nn.TransformerEncoderLayer(8, 2), "self_attn.out_proj")
    mamba = tiny("mamba")
    with pytest.raises(MismatchError, match="whose weight is read without a call"):
        linear(mamba, "backbone.layers.0.mixer.dt_proj")
    assert not [item.name for item in linears(mamba) if item.name.endswith("dt_proj")]
    bloom = tiny("bloom", slow_but_exact=True, pretraining_tp=2)
    assert not [item.name for item in linears(bloom) if item.name.endswith((".dense", ".dense_4h_to_h"))]
    with pytest.raises(MismatchError, match="no FFN was found"):
        find_ffn_sites(bloom)


@torch.no_grad()
def test_adapted_linears_count_once(tiny):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    names = [item.name for item in linears(model)]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down_proj"], r=2), model)
    assert [item.name for item in linears(model)] == names
