"""Every form, in every family, against the same maths written out in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import xpatch
from xpatch import DenseDelta, PatchSet, Rows
from xpatch.models import find_ffn_sites
from xpatch.runtime.layer import ball

FAMILIES = ("bert", "bert-mlm", "xlm-r", "gpt2", "gpt2-lm", "distilbert", "opt", "llama")
FORMS = ("neurons", "lowrank", "dense", "dense-no-bias")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_side_path(tiny, token_ids, patch_of, by_hand, family, form):
    model = tiny(family)
    patches = patch_of(model, form)
    expected = by_hand(model, patches)(token_ids).logits
    base = model(token_ids).logits
    exact = xpatch.apply(copy.deepcopy(model).double(), patches)(token_ids).logits
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-10)
    served = xpatch.apply(model, patches)(token_ids).logits
    torch.testing.assert_close(served.double(), expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(served, base)


def site_of(patches, model):
    """The linear layer that `patches` add to."""
    site = patches.parts["part"].site
    return next((found.down for found in find_ffn_sites(model) if found.name == site), site)


@pytest.mark.parametrize(
    "mask, gate", [(True, None), (False, "ball"), (False, "threshold"), (True, "threshold"), (True, "ball")]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
@torch.no_grad()
def test_masks_and_gates(tiny, token_ids, patch_of, by_hand, family, form, mask, gate):
    model = tiny(family).double()
    patches = patch_of(model, form, mask=mask, gate=gate)
    languages = ["de", "en", "xx"]  # a language the mask does not know passes unmasked
    twin = by_hand(model, patches, languages if mask else None)
    expected = twin(token_ids).logits
    if gate is not None:
        assert set(twin.get_submodule(site_of(patches, model)).opened) == {True, False}
    found = xpatch.apply(model, patches)(token_ids, xpatch=Rows(languages=languages)).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_a_language_for_all_rows_is_that_language_in_each(tiny, token_ids, patch_of):
    model = tiny("bert")
    xpatch.apply(model, patch_of(model, "neurons", mask=True))
    one = model(token_ids, xpatch=Rows(languages="de")).logits
    each = model(token_ids, xpatch=Rows(languages=["de"] * 3)).logits
    assert torch.equal(one, each)
    assert not torch.equal(one, model(token_ids, xpatch=Rows(languages="en")).logits)


@torch.no_grad()
def test_masks_without_languages_warn_once_and_are_left_out(tiny, token_ids, patch_of):
    model, bare = tiny("bert"), patch_of(tiny("bert"), "neurons", mask=True)
    xpatch.apply(model, bare, name="masked")
    with pytest.warns(UserWarning, match="'masked' has language masks but this call names no languages"):
        first = model(token_ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(token_ids).logits, first)
        xpatch.apply(model, patch_of(model, "neurons"), name="masked")
        assert torch.equal(model(token_ids).logits, first)


def test_ball_goes_by_the_nearest_key_and_its_own_radius():
    keys, radii = torch.tensor([[0.0], [10.0]]), torch.tensor([1.0, 4.0])
    x = torch.tensor([[1.0], [1.5], [4.9], [5.1], [6.0], [14.0], [14.1]])
    assert ball(x, keys, radii).tolist() == [True, False, False, False, True, True, False]
    assert ball(x.reshape(7, 1, 1), keys, radii).shape == (7, 1)
    assert not ball(x, keys[:0], radii[:0]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_16_bit_models(tiny, token_ids, patch_of, form, dtype):
    model = tiny("bert")
    patches = patch_of(model, form)
    model = model.to(dtype)
    base = model(token_ids).logits
    xpatch.apply(model, patches)
    served = model(token_ids).logits
    assert served.dtype == dtype and bool(served.isfinite().all()) and not torch.equal(served, base)
    # Moved after the fact: the same as made for it.
    later = xpatch.apply(tiny("bert"), patches)
    later.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    assert torch.equal(later.to(dtype)(token_ids).logits, served)
    assert torch.equal(xpatch.remove(model)(token_ids).logits, base)


@torch.no_grad()
def test_autocast_leaves_the_patch_in_full_precision(tiny, token_ids, patch_of):
    model = tiny("bert")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = model(token_ids).logits
        xpatch.apply(model, patch_of(model, "neurons"))
        assert not torch.equal(model(token_ids).logits, base)
        xpatch.apply(model, PatchSet(parts={}), name="nothing")
        xpatch.remove(model)
        assert torch.equal(model(token_ids).logits, base)


@torch.no_grad()
def test_several_sets_add_up_at_one_site(tiny, token_ids, patch_of, last_site):
    model = tiny("bert").double()
    site = last_site(model)
    first, second = (DenseDelta(site.down, torch.randn(32, 64), torch.randn(32)) for _ in range(2))
    both = DenseDelta(site.down, first.weight + second.weight, first.bias + second.bias)
    together = xpatch.apply(copy.deepcopy(model), PatchSet(parts={"d": both}))(token_ids).logits
    xpatch.apply(model, PatchSet(parts={"d": first}), name="a")
    xpatch.apply(model, PatchSet(parts={"d": second}), name="b")
    torch.testing.assert_close(model(token_ids).logits, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_training_through_a_patched_model(tiny, token_ids, patch_of, by_hand, form):
    model = tiny("bert").double()
    patches = patch_of(model, form)
    twin = by_hand(model, patches)
    xpatch.apply(model, patches)
    model.zero_grad()
    model(token_ids).logits.square().sum().backward()
    twin(token_ids).logits.square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                found[name.replace("dense.inner.", "dense.")], parameter.grad, rtol=1e-6, atol=1e-9
            )
    model.train()
    model(token_ids).logits.sum().backward()


def test_patches_first_used_in_inference_mode_can_still_be_trained_through(tiny, token_ids, patch_of):
    model = tiny("bert")
    xpatch.apply(model, patch_of(model, "neurons"))
    model.double()
    with torch.inference_mode():
        model(token_ids)
    model(token_ids).logits.sum().backward()
