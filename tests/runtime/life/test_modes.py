"""Modes of torch in any order: inference, gradients off, autocast, train and eval, other weights for one call, parametrized layers."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch

import xpatch
from xpatch.runtime.attach import runtime_of

FAMILIES = ("bert", "gpt2-lm", "llama", "t5")
MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "plain": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("order", list(itertools.permutations(MODES, 2)), ids="-".join)
def test_modes_in_any_order(tiny, token_ids, sets_for, patched, logits, no_trace, order):
    """What is cast and kept in one mode serves in the others; training comes after each of them."""
    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model)
    with torch.no_grad():
        expected = logits(patched(copy.deepcopy(model), sets), token_ids)
    with MODES[order[0]]():
        patched(model, sets)
    for mode in order:
        with MODES[mode]():
            found = logits(model, token_ids)
        close = {"atol": 5e-2, "rtol": 5e-2} if mode == "autocast" else {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(found.float(), expected, **close)
        logits(model, token_ids).sum().backward()
        assert model.classifier.weight.grad is not None
        model.zero_grad()
    del found  # the graph of the last call keeps the hooks until it is gone
    with MODES[order[-1]]():
        xpatch.remove(model)
    no_trace(model, base, token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_follows_the_side_path(tiny, token_ids, sets_for, patched, side_path, logits, no_trace, family):
    model = tiny(family)
    base, sets = copy.deepcopy(model), sets_for(model)
    with torch.no_grad():
        expected = logits(side_path(model, sets), token_ids)
        patched(model, sets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = logits(model, token_ids)
    torch.testing.assert_close(found.double(), expected, atol=0.1 * float(expected.abs().max()), rtol=0)
    assert (found - logits(base, token_ids)).abs().max() > (found - expected).abs().max()  # nearer to the patched one
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model, token_ids).float().pow(2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    no_trace(model, base, token_ids)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_eval(tiny, token_ids, sets_for, patched, logits, no_trace, family):
    model = tiny(family)
    base, sets = copy.deepcopy(model), sets_for(model)
    expected = logits(patched(model, sets), token_ids)
    for _ in range(3):
        with torch.enable_grad():
            logits(model.train(), token_ids).sum()
        assert torch.equal(logits(model.eval(), token_ids), expected)
    no_trace(model.train().eval(), base, token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_for_one_call(tiny, token_ids, sets_for, patched, side_path, no_trace, family):
    """`torch.func.functional_call`: the same patches beside them."""
    model, other = tiny(family).double(), tiny(family).double()
    base, sets = copy.deepcopy(model), sets_for(model)
    patched(model, sets)
    weights = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    more = {"input_ids": token_ids} | ({"decoder_input_ids": token_ids} if family == "t5" else {})
    found = torch.func.functional_call(model, weights, (), more).logits
    with torch.no_grad():
        expected = side_path(other, sets)(**more).logits
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(model(**more).logits, side_path(base, sets)(**more).logits, atol=1e-9, rtol=1e-6)
    chosen = torch.func.functional_call(model, weights, (), {**more, "xpatch": xpatch.Rows(patches="__base__")}).logits
    assert torch.equal(chosen, other(**more).logits)
    del found, chosen
    no_trace(model, base, token_ids)


def test_gradients_by_torch_func(tiny, token_ids, sets_for, patched, side_path):
    model = tiny("bert").double()
    sets = sets_for(model)
    twin = side_path(model, sets)
    patched(model, sets)

    def loss(parameters, one):
        return torch.func.functional_call(one, parameters, (token_ids,)).logits.pow(2).sum()

    found = torch.func.grad(loss)(dict(model.named_parameters()), model)
    expected = torch.func.grad(loss)(dict(twin.named_parameters()), twin)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name.replace(".inner.", ".")], gradient, atol=1e-9, rtol=1e-6)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
@pytest.mark.parametrize("patch_first", [True, False])
def test_a_parametrized_layer(tiny, token_ids, sets_for, patched, side_path, logits, no_trace, patch_first):
    """Weight norms, LoRA by hand: the layer computes with other weights, its patches are the same."""
    from torch.nn.utils import parametrize

    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model, base=False)
    twin = side_path(model, sets)
    dense = "bert.encoder.layer.1.output.dense"
    twin.get_submodule(dense).inner.weight.mul_(2)
    if patch_first:
        patched(model, sets)
    parametrize.register_parametrization(model.get_submodule(dense), "weight", Doubled())
    if not patch_first:
        patched(model, sets)
    expected = logits(twin, token_ids).float()
    torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-4, rtol=1e-4)
    parametrize.remove_parametrizations(model.get_submodule(dense), "weight", leave_parametrized=False)
    no_trace(model, base, token_ids)


def quantised(model):
    """Puts other modules in the places of the linear layers, and hands their hooks on, but without `with_kwargs`."""
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


def hooks_on(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(torch.ao.quantization, "quantize_dynamic"), reason="moved to torchao")
def test_layers_quantised_in_place(tiny, token_ids, sets_for, patched, logits):
    model = tiny("bert")
    other, sets = copy.deepcopy(model), sets_for(model, base=False)
    quantised(patched(model, sets))
    found = logits(model, token_ids)
    with xpatch.disabled(model):
        base = logits(model, token_ids)
    assert (found - base).abs().max() > 1e-2
    assert torch.equal(base, logits(quantised(other), token_ids))
    assert torch.equal(found, logits(patched(other, sets), token_ids))
    xpatch.apply(model, sets["neurons"], name="more")
    assert torch.equal(logits(xpatch.remove(model, "more"), token_ids), found)
    assert torch.equal(logits(xpatch.remove(model), token_ids), base)
    assert runtime_of(model) is None and hooks_on(model) == 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(torch.ao.quantization, "quantize_dynamic"), reason="moved to torchao")
def test_patches_removed_right_after_quantising(tiny, token_ids, sets_for, patched, logits):
    model = tiny("bert")
    other = quantised(copy.deepcopy(model))
    xpatch.remove(quantised(patched(model, sets_for(model))))
    assert runtime_of(model) is None and hooks_on(model) == 0
    assert torch.equal(logits(model, token_ids), logits(other, token_ids))


@torch.no_grad()
def test_a_swap_in_inference_mode_leaves_ordinary_tensors(tiny, token_ids, sets_for, patched, logits):
    model = tiny("bert")
    with torch.inference_mode():
        patched(model, sets_for(model))
        logits(model, token_ids)
    for applied in runtime_of(model).snapshot.sets.values():
        for part in applied.parts:
            assert not any(tensor.is_inference() for cast in part.tensors._cast.values() for tensor in cast.values())
