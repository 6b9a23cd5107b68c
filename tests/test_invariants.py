"""What apply and remove promise: the base is never changed, and comes back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

import xpatch
from xpatch import DenseDelta, Gate, LanguageMask, LowRankDelta, PatchNeurons, PatchSet
from xpatch.models import find_ffn_sites

FAMILIES = ("bert", "bert-mlm", "xlm-r", "gpt2", "gpt2-lm", "distilbert", "opt", "llama")


def everything(model) -> PatchSet:
    """A set with every form, a mask and both gates, at every FFN."""
    parts = {}
    for site in find_ffn_sites(model):
        d, f = site.width, site.inner
        parts[f"n{site.layer}"] = PatchNeurons(
            site.name, torch.randn(4, d), torch.randn(4), torch.randn(4, d), "gelu", mask="m"
        )
        parts[f"l{site.layer}"] = LowRankDelta(site.down, torch.randn(2, f), torch.randn(d, 2), gate="t")
        parts[f"d{site.layer}"] = DenseDelta(site.up, torch.randn(f, d), torch.randn(f), gate="b")
    return PatchSet(
        parts=parts,
        masks={"m": LanguageMask(("en", "de"), torch.rand(2, d), torch.rand(2, d))},
        gates={
            "t": Gate("threshold", threshold=0.1),
            "b": Gate("ball", keys=torch.randn(3, d), radii=torch.full((3,), 8.0)),
        },
    )


def snapshot(model):
    """Bytes and names of the state, classes and attributes of every module."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    modules = [
        (name, type(module), sorted(vars(module)), bool(module.training)) for name, module in model.named_modules()
    ]
    hooks = [
        len(table)
        for module in model.modules()
        for key, table in sorted(vars(module).items())
        if "hooks" in key and hasattr(table, "__len__")
    ]
    return state, modules, hooks


def same_state(first, second) -> bool:
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype
        and torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_apply_and_remove_leave_no_trace(tiny, token_ids, family, dtype):
    model = tiny(family).to(dtype)
    patches = everything(model)
    state, modules, hooks = snapshot(model)
    base = model(token_ids).logits
    with xpatch.rows(languages="de"):
        xpatch.apply(model, patches, name="a")
        served = model(token_ids).logits
        assert not torch.equal(served, base)
        assert same_state(model.state_dict(), state)
        assert [item[:2] for item in snapshot(model)[1]] == [item[:2] for item in modules]
        with xpatch.disabled(model):
            assert torch.equal(model(token_ids).logits, base)
        xpatch.apply(model, patches, name="b")
        assert not torch.equal(model(token_ids).logits, served)
        xpatch.remove(model, "b")
        assert torch.equal(model(token_ids).logits, served)
        xpatch.remove(model, "a")
    after = snapshot(model)
    assert same_state(after[0], state) and after[1] == modules and after[2] == hooks
    assert torch.equal(model(token_ids).logits, base)


@torch.no_grad()
def test_rows_at_base_keep_their_bits_in_a_mixed_batch(tiny, token_ids):
    model = tiny("bert")
    base = model(token_ids).logits
    xpatch.apply(model, everything(model), name="a")
    with xpatch.rows(languages="en", patches=["a", "__base__", "a"]):
        mixed = model(token_ids).logits
    assert torch.equal(mixed[1], base[1]) and not torch.equal(mixed[0], base[0])


@torch.no_grad()
def test_an_empty_set_changes_no_bit(tiny, token_ids):
    model = tiny("bert")
    base = model(token_ids).logits
    empty = PatchNeurons("bert.encoder.layer.1", torch.zeros(0, 32), torch.zeros(0), torch.zeros(0, 32), "relu")
    xpatch.apply(model, PatchSet(parts={"none": empty}), name="empty")
    assert torch.equal(model(token_ids).logits, base)
    xpatch.remove(model)


def test_saving_a_patched_model_saves_its_base(tiny, token_ids, tmp_path):
    model = tiny("bert")
    with torch.no_grad():
        base = model(token_ids).logits
    xpatch.apply(model, everything(copy.deepcopy(model)), name="a")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(token_ids).logits, base)
    assert xpatch.status(again).names == ()
