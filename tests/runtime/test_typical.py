"""Keys packed for typical inputs: nothing but the speed of screening depends on them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import xpatch
from xpatch import MismatchError, PatchNeurons, PatchSet
from xpatch.models.anatomy import final_ffn
from xpatch.ops.screening import COARSE_FROM_NEURONS
from xpatch.runtime.attach import runtime_of
from xpatch.runtime.typical import ROWS_AT_MOST


def thousands(model, seed=0):
    """So many neurons that the directions of keys and rows are looked at."""
    site, generator = final_ffn(model), torch.Generator().manual_seed(seed)
    keys = torch.randn(COARSE_FROM_NEURONS, site.width, generator=generator) / site.width**0.5
    bias = torch.randn(len(keys), generator=generator) - 4
    values = torch.randn(len(keys), site.width, generator=generator)
    return PatchSet({"neurons": PatchNeurons(site.name, keys, bias, values, "relu")})


def packed(model, name="many"):
    tensors = runtime_of(model).snapshot.sets[name].parts[0].tensors
    return tensors.on(torch.device("cpu"), torch.float32).get("packed")


@pytest.fixture
def wide(tiny):
    return tiny("bert", hidden_size=192, num_attention_heads=4)


@torch.no_grad()
def test_packed_anew_and_the_answers_keep_their_bits(wide, token_ids):
    xpatch.apply(wide, thousands(wide), name="many")
    before, expected = packed(wide), wide(token_ids)
    assert xpatch.prepare(wide, sample={"input_ids": token_ids}) is wide
    after = packed(wide)
    assert before is None or not torch.equal(after, before)
    assert torch.equal(wide(token_ids).logits, expected.logits)
    xpatch.apply(wide, thousands(wide), name="more")  # what comes later, and in copies, is packed alike
    for found in (packed(wide, "more"), packed(copy.deepcopy(wide))):
        assert before is None or torch.equal(found, after)
    assert torch.equal(pickle.loads(pickle.dumps(wide))(token_ids).logits, wide(token_ids).logits)
    xpatch.remove(wide)
    xpatch.prepare(wide, off=True)
    assert runtime_of(wide) is None


@torch.no_grad()
def test_rows_are_those_that_reach_the_site(wide, token_ids):
    seen = []
    handle = wide.get_submodule(final_ffn(wide).up).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batches = [{"input_ids": token_ids}, {"input_ids": token_ids[:1] + 1}]
    wide.train()
    xpatch.prepare(wide, sample=batches)
    assert wide.training and all(module.training for module in wide.modules())
    handle.remove()
    (rows,) = runtime_of(wide).typical.values()
    assert torch.equal(rows, torch.cat([x.reshape(-1, 192) for x in seen]))
    xpatch.optimize(wide.eval())
    xpatch.prepare(wide, sample=batches)
    (rows,) = runtime_of(wide).typical.values()
    assert rows.shape == (len(token_ids) + 1, 192)  # the rows that the head reads


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True], ids=["compiled first", "prepared first"])
def test_compiled_models(wide, token_ids, before):
    if before:
        xpatch.prepare(wide)
    wide.compile(backend="eager", fullgraph=True)
    wide(token_ids)
    xpatch.prepare(wide, sample={"input_ids": token_ids})
    (rows,) = runtime_of(wide).typical.values()
    assert len(rows) == token_ids.numel()
    xpatch.apply(wide, thousands(wide), name="many")
    patched = wide(token_ids).logits
    with xpatch.disabled(wide):
        assert not torch.equal(wide(token_ids).logits, patched)


@torch.no_grad()
def test_many_rows_are_thinned(wide):
    ids = torch.randint(5, 99, (300, 8))
    xpatch.prepare(wide, sample={"input_ids": ids})
    (rows,) = runtime_of(wide).typical.values()
    assert ROWS_AT_MOST / 2 < len(rows) <= ROWS_AT_MOST


@pytest.mark.parametrize("sample, found", [([], "nothing"), ([1], "int"), (["a text"], "str"), ("text", "str")])
def test_a_sample_that_is_none_is_refused(wide, sample, found):
    with pytest.raises(MismatchError, match=f"keyword arguments of a call.*found {found}"):
        xpatch.prepare(wide, sample=sample)


def test_a_sample_the_model_cannot_answer_leaves_no_trace(wide, token_ids):
    xpatch.apply(wide, thousands(wide), name="many")
    before = packed(wide)
    with pytest.raises((TypeError, ValueError)):
        xpatch.prepare(wide, sample={"no_such_argument": token_ids})
    assert packed(wide) is before and not runtime_of(wide).typical
    bare = copy.deepcopy(wide)
    xpatch.remove(bare)
    with pytest.raises((TypeError, ValueError)):
        xpatch.prepare(bare, sample={"no_such_argument": token_ids})
    assert runtime_of(bare) is None  # not even prepared
    modules = [wide, wide.get_submodule(final_ffn(wide).up)]
    assert all(hook.__module__.startswith("xpatch") for m in modules for hook in m._forward_pre_hooks.values())
