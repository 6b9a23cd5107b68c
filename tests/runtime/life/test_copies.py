"""Copies of a patched model carry its patches and go their own way: deep copies, pickles, other processes."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading

import pytest
import torch

import xpatch
from xpatch.runtime.attach import runtime_of
from xpatch.runtime.capacity import capture

FAMILIES = ("bert", "gpt2-lm", "llama", "t5")


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CLONES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "a copy of a copy": lambda model: copy.deepcopy(saved_and_loaded(copy.deepcopy(model))),
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clone", CLONES)
def test_copies_go_their_own_way(tiny, token_ids, sets_for, patched, logits, no_trace, clone, family):
    model = tiny(family)
    base, sets = copy.deepcopy(model), sets_for(model)
    patched(model, sets)
    xpatch.status(model, count=True)
    both = logits(model, token_ids)
    other = CLONES[clone](model)
    assert xpatch.status(other) == xpatch.status(model)
    assert torch.equal(logits(other, token_ids), both)

    xpatch.remove(other, "neurons")
    deltas = logits(other, token_ids)
    assert torch.equal(logits(model, token_ids), both) and not torch.equal(deltas, both)
    no_trace(model, base, token_ids)
    assert torch.equal(logits(other, token_ids), deltas)
    assert torch.equal(logits(other, token_ids, xpatch=xpatch.Rows(patches="__base__")), logits(base, token_ids))
    with xpatch.disabled(model):
        assert torch.equal(logits(other, token_ids), deltas)  # the other model's switch
    patched(model, sets)
    no_trace(other, base, token_ids)
    assert torch.equal(logits(model, token_ids), both)


@torch.no_grad()
def test_generate_of_a_copy_is_the_copys(tiny, token_ids, sets_for, patched, no_trace):
    model = tiny("gpt2-lm")
    base, sets = copy.deepcopy(model), sets_for(model)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(token_ids)}
    other = copy.deepcopy(patched(model, sets))
    texts = model.generate(token_ids, **options)
    xpatch.remove(other)
    assert torch.equal(model.generate(token_ids, **options), texts)
    assert torch.equal(other.generate(token_ids, **options), base.generate(token_ids, **options))
    assert not torch.equal(texts, base.generate(token_ids, **options))
    no_trace(other, base)


@torch.no_grad()
@pytest.mark.parametrize("clone", ["deepcopy", "torch.save"])
def test_a_copy_taken_in_the_middle_of_a_call(tiny, token_ids, sets_for, patched, logits, no_trace, clone):
    """The call that runs is the original's alone."""
    model = tiny("bert")
    base, copies = copy.deepcopy(model), []
    patched(model, sets_for(model))

    def take(*ignored):
        handle.remove()
        copies.append(CLONES[clone](model))

    handle = model.bert.encoder.layer[0].register_forward_hook(take)
    expected = logits(model, token_ids)
    (other,) = copies
    assert not runtime_of(other)._active
    assert torch.equal(logits(other, token_ids), expected)
    no_trace(other, base, token_ids)


@torch.no_grad()
def test_a_model_in_use_by_threads_can_be_copied(tiny, token_ids, sets_for, patched, logits):
    model = patched(tiny("bert"), sets_for(tiny("bert"), base=False))
    xpatch.status(model, count=True)
    expected, stop, failures = logits(model, token_ids), threading.Event(), []

    def serve():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    assert torch.equal(logits(model, token_ids), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    torch.set_num_threads(1)
    for thread in threads:
        thread.start()
    try:
        for turn in range(12):
            other = list(CLONES.values())[turn % 3](model)
            assert torch.equal(logits(other, token_ids), expected)
            xpatch.remove(other)
            assert runtime_of(other) is None
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


@torch.no_grad()
@pytest.mark.parametrize("clone", ["deepcopy", "torch.save"])
def test_a_prepared_model_with_room(tiny, token_ids, sets_for, logits, no_trace, clone):
    model = tiny("bert")
    base = copy.deepcopy(model)
    site = xpatch.models.anatomy.final_ffn(model).name
    part = xpatch.PatchNeurons(site, torch.randn(3, 32), torch.randn(3), torch.randn(3, 32), "relu")
    xpatch.prepare(model, capacity=8)
    xpatch.apply(model, xpatch.PatchSet({"part": part}), name="a")
    other = CLONES[clone](model)
    with capture():
        expected = logits(model, token_ids)
        torch.testing.assert_close(logits(other, token_ids), expected)
        xpatch.remove(other)  # fills the copy's own buffers
        torch.testing.assert_close(logits(model, token_ids), expected)
        assert torch.equal(logits(other, token_ids), logits(base, token_ids))
    assert runtime_of(other) is not None  # still prepared
    xpatch.prepare(other, off=True)
    no_trace(other, base, token_ids)


@torch.no_grad()
@pytest.mark.parametrize("clone", ["deepcopy", "torch.save"])
def test_a_copy_of_a_compiled_model(tiny, token_ids, sets_for, patched, logits, no_trace, clone):
    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model)
    patched(model, sets)
    expected = logits(model, token_ids)
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-5, rtol=1e-4)
    other = CLONES[clone](model)
    torch.testing.assert_close(logits(other, token_ids), expected, atol=1e-5, rtol=1e-4)
    xpatch.remove(other)
    torch.testing.assert_close(logits(other, token_ids), logits(base, token_ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def answer(model, ids, results):
    """What a spawned child does with the model it is sent."""
    torch.set_num_threads(1)
    with torch.no_grad():
        patched = model(ids).logits
        with xpatch.disabled(model):
            base = model(ids).logits
        xpatch.remove(model)
        results.put([patched.numpy(), base.numpy(), model(ids).logits.numpy(), runtime_of(model) is None])


@pytest.mark.slow  # the child imports everything anew
def test_a_model_is_sent_to_a_spawned_process(tiny, token_ids, sets_for, patched):
    context = multiprocessing.get_context("spawn")
    model, results = tiny("bert"), context.Queue()
    with torch.no_grad():
        base = model(token_ids).logits
        expected = patched(model, sets_for(model))(token_ids).logits
    child = context.Process(target=answer, args=(model, token_ids, results))
    child.start()
    found, off, removed, clean = results.get(timeout=120)
    child.join(30)
    assert child.exitcode == 0 and clean
    assert torch.equal(torch.from_numpy(found), expected)
    assert torch.equal(torch.from_numpy(off), base) and torch.equal(torch.from_numpy(removed), base)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected)


@torch.no_grad()
def test_a_copy_of_a_part_alone_is_the_bases(tiny, token_ids, sets_for, patched):
    """Nobody could take its patches off, and they would carry a hidden copy of the whole model."""
    model = tiny("bert")
    base = copy.deepcopy(model)
    patched(model, sets_for(model))
    part = copy.deepcopy(model.bert)
    assert torch.equal(part(token_ids).last_hidden_state, base.bert(token_ids).last_hidden_state)
    layer = copy.deepcopy(model.bert.encoder.layer[1])
    hidden = torch.randn(2, 3, 32)
    assert torch.equal(layer(hidden)[0], base.bert.encoder.layer[1](hidden)[0])
    assert not torch.equal(model.bert(token_ids).last_hidden_state, base.bert(token_ids).last_hidden_state)


@torch.no_grad()
def test_a_copy_inside_something_else_keeps_its_patches(tiny, token_ids, sets_for, patched, logits):
    from torch.optim.swa_utils import AveragedModel

    model = tiny("bert")
    patched(model, sets_for(model))
    expected = logits(model, token_ids)
    averaged = AveragedModel(model)
    assert torch.equal(averaged(token_ids).logits, expected)
    xpatch.remove(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(token_ids).logits, expected)
    xpatch.remove(averaged.module)
    assert torch.equal(averaged(token_ids).logits, logits(model, token_ids))
