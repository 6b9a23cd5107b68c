"""Moving and casting a patched model: the patches follow, and what they are cast to is given back."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import xpatch
from xpatch.runtime.attach import runtime_of

FAMILIES = ("bert", "gpt2-lm", "llama", "t5")
CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "float": lambda model: model.double().float(),
    "to(dtype)": lambda model: model.to(torch.bfloat16),
    "to(device, dtype)": lambda model: model.to("cpu", torch.float64),
}
#: Largest difference from the same maths in float64 on the same (rounded) weights, for logits of about one.
CLOSE = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1, torch.float32: 1e-4, torch.float64: 1e-10}


def tensors_of(model):
    return [part.tensors for applied in runtime_of(model).snapshot.sets.values() for part in applied.parts]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cast", CASTS)
def test_patches_follow_a_cast(tiny, token_ids, sets_for, patched, side_path, logits, no_trace, cast, family):
    model = tiny(family)
    sets = sets_for(model)
    after = CASTS[cast](patched(copy.deepcopy(model), sets))  # applied, then cast
    base = CASTS[cast](model)
    before = patched(copy.deepcopy(base), sets)  # cast, then applied; still the same base
    found = logits(before, token_ids)
    assert torch.equal(logits(after, token_ids), found)
    expected = logits(side_path(base, sets), token_ids)
    assert found.dtype == next(base.parameters()).dtype
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected, atol=CLOSE[found.dtype] * scale, rtol=0)
    assert (found.double() - logits(base, token_ids)).abs().max() > 2 * CLOSE[torch.float32]
    assert torch.equal(logits(xpatch.remove(after), token_ids), logits(base, token_ids))
    no_trace(before, base, token_ids)


@torch.no_grad()
def test_casting_to_and_fro_keeps_no_casts(tiny, token_ids, sets_for, patched, logits, no_trace):
    """In fp32 and narrower the patches are the same tensors; after a stay in fp64 one more copy is kept, never more."""
    model = tiny("bert")
    patched(model, sets_for(model))
    expected = logits(model, token_ids)
    for dtype in (torch.float64, torch.float16, torch.float64, torch.bfloat16, torch.float32) * 2:
        model.to(dtype)
        logits(model, token_ids)
    for tensors in tensors_of(model):
        assert {dtype for _, dtype in tensors._cast} <= {torch.float32, torch.float64}
    torch.testing.assert_close(logits(model, token_ids), expected, atol=5e-2, rtol=5e-2)  # the weights were rounded


@torch.no_grad()
def test_swapping_without_end_keeps_no_tensors(tiny, token_ids, sets_for, patched, logits):
    model = tiny("bert")
    sets = sets_for(model)

    def count():
        gc.collect()
        return sum(type(found) is torch.Tensor for found in gc.get_objects())

    for _ in range(3):
        patched(model, sets)
        logits(model, token_ids)
        xpatch.remove(model)
    before = count()
    for _ in range(30):
        patched(model, sets_for(model))
        logits(model.double(), token_ids)
        logits(model.float(), token_ids)
        xpatch.remove(model)
    assert count() - before < 10


@torch.no_grad()
def test_a_model_without_memory_and_back(tiny, token_ids, sets_for, patched, logits, no_trace):
    """`to("meta")` and `to_empty`, as checkpoint loaders do."""
    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model)
    expected = logits(patched(model, sets), token_ids)
    model.to("meta")
    with pytest.raises(xpatch.MismatchError, match="expected its values in memory, found the meta device"):
        xpatch.apply(model, sets["neurons"], name="neurons")
    assert xpatch.status(model).names == ("neurons", "deltas")
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict())
    for name, buffer in base.named_buffers():  # those that no state dict holds
        model.get_buffer(name).copy_(buffer)
    assert torch.equal(logits(model, token_ids), expected)
    no_trace(model, base, token_ids)


@torch.no_grad()
def test_a_layer_of_another_precision(tiny, token_ids, sets_for, patched, logits, side_path, no_trace):
    """T5 in half precision keeps its down projections in fp32."""
    model = tiny("t5")
    sets = sets_for(model, base=False)
    patched(model, sets).half()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    base = copy.deepcopy(model)
    expected = logits(side_path(xpatch.remove(base), sets), token_ids)
    found = logits(model, token_ids)
    torch.testing.assert_close(
        found.double(), expected, atol=CLOSE[torch.float16] * float(expected.abs().max()), rtol=0
    )
    no_trace(model, base, token_ids)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2-lm"])
def test_a_default_dtype_changes_nothing(tiny, token_ids, sets_for, patched, logits, family):
    model = tiny(family)
    sets = sets_for(model)
    expected = logits(patched(model, sets), token_ids)
    xpatch.remove(model)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(logits(patched(model, sets), token_ids), expected)
    finally:
        torch.set_default_dtype(torch.float32)
