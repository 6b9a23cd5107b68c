"""The base's weights under their plain names, whatever stands in front of the model or of its layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from xpatch.patches import weights


def names(pairs):
    return [name for name, _ in pairs]


def test_a_plain_model_is_named_as_torch_names_it(tiny):
    for family in ("bert-mlm", "t5", "gpt2-lm"):  # with tied weights, and shared modules
        model = tiny(family)
        assert list(weights.named_parameters(model)) == list(model.named_parameters())
        assert names(weights.named_modules(model)) == names(model.named_modules())
        assert weights.innermost(model) is model and weights.behind(model) is None
        assert weights.offloaded(model) == {}


def test_wrappers_in_any_nesting(tiny):
    model = tiny("bert")
    plain = names(model.named_parameters())
    for wrap in (
        torch.compile,
        nn.DataParallel,
        lambda module: nn.DataParallel(torch.compile(module)),
        lambda module: torch.compile(nn.DataParallel(module)),
    ):
        wrapped = wrap(model)
        assert weights.innermost(wrapped) is model
        assert names(weights.named_parameters(wrapped)) == plain
    model.bert.encoder = torch.compile(model.bert.encoder)
    assert names(weights.named_parameters(model)) == plain


def test_adapters_are_left_out(tiny):
    peft = pytest.importorskip("peft")
    model = tiny("bert")
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["dense", "query"], modules_to_save=["classifier"])
    wrapped = torch.compile(nn.DataParallel(peft.get_peft_model(model, config)))
    assert weights.innermost(wrapped) is model
    assert names(weights.named_parameters(wrapped)) == names(plain.named_parameters())
    assert names(weights.named_modules(wrapped)) == names(plain.named_modules())
    for (name, found), expected in zip(weights.named_parameters(wrapped), plain.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_a_module_of_ones_own_with_such_names_is_no_wrapper():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.base_layer, self.original_module = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    model = Model()
    assert weights.behind(model) is None
    assert list(weights.named_parameters(model)) == list(model.named_parameters())


def test_what_is_offloaded_is_found_where_it_is(tiny, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny("bert")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    places = weights.offloaded(model)
    for name, parameter in weights.named_parameters(model):
        assert parameter.is_meta and torch.equal(places[id(parameter)](), before[name])


@pytest.mark.parametrize(
    ("family", "shared", "alone"),
    [
        ("t5", "lm_head.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"),
        ("bert-mlm", "cls.predictions.decoder.bias", "cls.predictions.transform.dense.bias"),
        ("bert", None, "classifier.weight"),
    ],
)
def test_which_weights_may_be_shared(tiny, family, shared, alone):
    may_be_shared = weights.tied(tiny(family))
    assert shared is None or may_be_shared(shared)
    assert not may_be_shared(alone)


def test_patterns_of_older_transformers(tiny):
    model = nn.Module()
    model._tied_weights_keys = ["predictions.decoder.bias", r"lm_head\..*"]
    may_be_shared = weights.tied(model)
    assert may_be_shared("cls.predictions.decoder.bias") and may_be_shared("lm_head.weight")
    assert not may_be_shared("encoder.weight")
