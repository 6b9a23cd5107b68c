"""Training through a patched model: the base learns as beside the explicit side path, the patches stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch

import xpatch

FAMILIES = ("bert", "gpt2-lm", "llama", "t5")


def tensors_of(sets):
    return [tensor for patches in sets.values() for tensor in patches.tensors.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_side_paths(
    tiny, token_ids, sets_for, patched, side_path, logits, no_trace, gradients, close, family
):
    model = tiny(family).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    base, sets = copy.deepcopy(model), sets_for(model)
    twin = side_path(model, sets).train()
    before = [tensor.clone() for tensor in tensors_of(sets)]
    patched(model, sets)
    for one in (model, twin):
        torch.manual_seed(5)  # dropout is on, and draws the same
        out = logits(one, token_ids)
        out.pow(2).sum().backward()
    close(gradients(model), gradients(twin))
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in tensors_of(sets))
    assert all(map(torch.equal, tensors_of(sets), before))
    model.zero_grad()
    assert not gradients(model)
    no_trace(model.eval(), base.eval(), token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_inputs(tiny, token_ids, sets_for, patched, side_path, gradients, family):
    model = tiny(family).double()
    sets = sets_for(model)
    twin = side_path(model, sets)
    patched(model, sets).requires_grad_(False)
    twin.requires_grad_(False)
    embedded = model.get_input_embeddings()(token_ids)
    found = []
    for one in (model, twin):
        inputs = embedded.clone().requires_grad_()
        more = {"decoder_input_ids": token_ids} if family == "t5" else {}
        one(inputs_embeds=inputs, **more).logits.pow(2).sum().backward()
        found.append(inputs.grad)
        assert not gradients(one)
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_trained_while_it_is_patched(
    tiny, token_ids, sets_for, patched, side_path, logits, no_trace, close, family
):
    model = tiny(family).double()
    base, sets = copy.deepcopy(model), sets_for(model)
    twin = side_path(model, sets)
    patched(model, sets)
    losses = []
    for one in (model, twin):
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = logits(one, token_ids).pow(2).mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    trained = {name.replace(".inner.", "."): tensor for name, tensor in twin.state_dict().items()}
    close(model.state_dict(), trained)
    with pytest.raises(xpatch.MismatchError, match="weights of layer"):  # it is another base now
        xpatch.apply(model, sets["neurons"], name="again")
    assert xpatch.status(model).names == tuple(sets)  # what was on stays on
    xpatch.remove(model)
    base.load_state_dict(model.state_dict())
    no_trace(model, base, token_ids)


def test_only_some_parameters_are_trained(tiny, token_ids, sets_for, patched, side_path, logits, gradients, close):
    model = tiny("bert").double()
    sets = sets_for(model)
    twin = side_path(model, sets)
    patched(model, sets)
    for one in (model, twin):
        one.requires_grad_(False)
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("layer.0.intermediate" in name or "classifier" in name)
        logits(one, token_ids).pow(2).sum().backward()
    found = gradients(model)
    close(found, gradients(twin))
    assert all("layer.0.intermediate" in name or "classifier" in name for name in found)


def test_a_swap_between_forward_and_backward(
    tiny, token_ids, sets_for, patched, side_path, logits, no_trace, gradients, close
):
    """A backward pass belongs to the forward it follows."""
    model = tiny("bert").double()
    base, sets = copy.deepcopy(model), sets_for(model)
    twin = side_path(model, sets)
    patched(model, sets)
    out = logits(model, token_ids)
    xpatch.remove(model)
    xpatch.apply(model, sets_for(base, seed=9, base=False)["neurons"], name="other")
    out.pow(2).sum().backward()
    logits(twin, token_ids).pow(2).sum().backward()
    close(gradients(model), gradients(twin))
    model.zero_grad()
    no_trace(model, base, token_ids)


def test_rows_and_masks_of_gradients(tiny, token_ids, sets_for, patched, side_path, logits, gradients, close):
    """Each row's gradient is that of its own patches."""
    model = tiny("bert").double()
    sets = sets_for(model)
    patched(model, sets)
    rows = xpatch.Rows(patches=["__base__", "neurons", ["neurons", "deltas"]])
    logits(model, token_ids, xpatch=rows).pow(2).sum().backward()
    expected = {}
    for row, chosen in enumerate(({}, {"neurons": sets["neurons"]}, sets)):
        twin = side_path(tiny("bert").double(), {})
        twin.load_state_dict(model.state_dict())
        twin = side_path(twin, chosen)
        logits(twin, token_ids[row : row + 1]).pow(2).sum().backward()
        for name, gradient in gradients(twin).items():
            expected[name] = expected.get(name, 0) + gradient
    close(gradients(model), expected)


def test_higher_order_gradients(tiny, token_ids, sets_for, patched, side_path):
    """Gradient penalties and meta-learning differentiate twice."""
    model = tiny("bert").double()
    model.config._attn_implementation = "eager"
    sets = sets_for(model)
    twin = side_path(model, sets)
    patched(model, sets)
    embedded, found = model.get_input_embeddings()(token_ids).detach(), []
    for one in (model, twin):
        inputs = embedded.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(inputs_embeds=inputs).logits.sum(), inputs, create_graph=True)
        first.pow(2).sum().backward()
        found.append(inputs.grad)
    torch.testing.assert_close(*found, atol=1e-8, rtol=1e-5)
