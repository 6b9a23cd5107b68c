"""Gradient checkpointing: a layer computed again in the backward pass sees the patches and rows of the call it belongs to."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

import xpatch
from xpatch.runtime.attach import runtime_of

NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2-lm": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
    "t5": {"dropout_rate": 0.0},
}
FAMILIES = tuple(NO_DROPOUT)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


@pytest.fixture
def pair(tiny, sets_for):
    """(plain, checkpointed): the same model in float64, in training; and sets for it."""

    def make(family, reentrant):
        plain = tiny(family, **NO_DROPOUT[family]).double().train()
        plain.enable_input_require_grads()
        return plain, checkpointed(copy.deepcopy(plain), reentrant), sets_for(plain)

    return make


@REENTRANT
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_checkpoints(
    pair, token_ids, patched, logits, no_trace, gradients, close, family, reentrant
):
    plain, model, sets = pair(family, reentrant)
    base = copy.deepcopy(model)
    rows = xpatch.Rows(patches=["__base__", "neurons", ["neurons", "deltas"]])
    for one in (plain, model):
        patched(one, sets)
        logits(one, token_ids).pow(2).sum().backward()
    close(gradients(model), gradients(plain))
    computed = []
    up = xpatch.models.anatomy.final_ffn(model).up
    handle = model.get_submodule(up).register_forward_hook(lambda *ignored: computed.append(1))
    for one in (plain, model):
        logits(one, token_ids, xpatch=rows).pow(2).sum().backward()
    assert len(computed) == 2  # again in the backward pass
    handle.remove()
    close(gradients(model), gradients(plain))
    no_trace(model.eval(), base.eval(), token_ids)


@REENTRANT
@pytest.mark.parametrize("family", FAMILIES)
def test_a_swap_between_forward_and_backward(
    pair, token_ids, patched, logits, sets_for, gradients, close, family, reentrant
):
    plain, model, sets = pair(family, reentrant)
    other = sets_for(plain, seed=9)
    for one in (plain, model):
        patched(one, sets)
        loss = logits(one, token_ids, xpatch=xpatch.Rows(patches=["neurons", "deltas", "__base__"])).pow(2).sum()
        xpatch.remove(one, "deltas")
        xpatch.apply(one, other["neurons"], name="neurons")
        loss.backward()
    close(gradients(model), gradients(plain))
    for one in (plain, model):  # and everything off before the backward pass
        loss = logits(one, token_ids).pow(2).sum()
        xpatch.remove(one)
        loss.backward()
        del loss
    close(gradients(model), gradients(plain))
    for one in (plain, model):
        xpatch.remove(one)
        assert runtime_of(one) is None


@REENTRANT
def test_two_forwards_before_their_backwards(pair, token_ids, patched, logits, gradients, close, reentrant):
    plain, model, sets = pair("bert", reentrant)
    choices = [xpatch.Rows(patches="__base__"), xpatch.Rows(patches=["neurons", "deltas", None]), None]
    for order in ([0, 1, 2], [2, 1, 0]):
        for one in (plain, model):
            patched(one, sets)
            losses = [logits(one, token_ids, xpatch=choice).pow(2).sum() for choice in choices]
            xpatch.remove(one)
            for index in order:
                losses[index].backward()
            del losses
        close(gradients(model), gradients(plain))


@REENTRANT
def test_one_loss_over_two_forwards(pair, token_ids, patched, logits, gradients, close, reentrant):
    """A penalty for leaving the base: both forwards are computed again in one backward pass."""
    plain, model, sets = pair("bert", reentrant)
    for one in (plain, model):
        patched(one, sets)
        on = logits(one, token_ids)
        with xpatch.disabled(one):
            off = logits(one, token_ids)
        (on - off).pow(2).sum().backward()
    close(gradients(model), gradients(plain))


@REENTRANT
def test_disabled_around_the_forward_or_the_backward_alone(
    pair, token_ids, patched, logits, gradients, close, reentrant
):
    plain, model, sets = pair("gpt2-lm", reentrant)
    for one in (plain, model):
        patched(one, sets)
        with xpatch.disabled(one):
            loss = logits(one, token_ids).pow(2).sum()
        loss.backward()
        loss = logits(one, token_ids).pow(2).sum()
        with xpatch.disabled(one):
            loss.backward()
    close(gradients(model), gradients(plain))


@REENTRANT
def test_backward_in_another_thread(pair, token_ids, patched, logits, gradients, close, reentrant):
    plain, model, sets = pair("bert", reentrant)
    for one in (plain, model):
        patched(one, sets)
        loss = logits(one, token_ids, xpatch=xpatch.Rows(patches=["neurons", "__base__", None])).pow(2).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    close(gradients(model), gradients(plain))


@REENTRANT
def test_a_mask_of_languages(pair, token_ids, gradients, close, reentrant):
    plain, model, _ = pair("bert", reentrant)
    site = xpatch.models.anatomy.final_ffn(plain).name
    part = xpatch.PatchNeurons(site, torch.randn(5, 32), torch.randn(5), torch.randn(5, 32), "relu", mask="lang")
    mask = xpatch.LanguageMask(("en", "de"), torch.randn(2, 32), torch.randn(2, 32))
    patches = xpatch.PatchSet({"part": part}, masks={"lang": mask})
    for one in (plain, model):
        xpatch.apply(one, patches, name="a")
        one(token_ids, xpatch=xpatch.Rows(languages=["en", "de", "fr"])).logits.pow(2).sum().backward()
    close(gradients(model), gradients(plain))


@REENTRANT
def test_memory_is_let_go(pair, token_ids, patched, logits, reentrant):
    """What is remembered of a call goes with its graph; the last of it takes the hooks along."""
    _, model, sets = pair("bert", reentrant)
    patched(model, sets)
    runtime = runtime_of(model)
    loss = logits(model, token_ids).sum()
    assert runtime._recall
    snapshot = weakref.ref(runtime.snapshot)
    xpatch.remove(model)
    assert runtime_of(model) is runtime and snapshot() is not None  # for the backward pass that may come
    loss.backward()
    del loss
    model.zero_grad()
    with torch.no_grad():
        logits(model, token_ids)  # the next call tidies up
    assert runtime_of(model) is None and not runtime._recall
    del runtime
    gc.collect()
    assert snapshot() is None


def test_a_graph_without_checkpoints_keeps_no_hooks(pair, token_ids, patched, logits):
    plain, _, sets = pair("bert", False)
    patched(plain, sets)
    loss = logits(plain, token_ids).sum()
    assert not runtime_of(plain)._recall
    xpatch.remove(plain)
    assert runtime_of(plain) is None
    loss.backward()


@REENTRANT
def test_nothing_piles_up_while_training(pair, token_ids, patched, logits, reentrant):
    _, model, sets = pair("bert", reentrant)
    patched(model, sets)
    recall = runtime_of(model)._recall
    for _ in range(100):
        logits(model, token_ids).sum().backward()
        model.zero_grad()
    assert len(recall._calls) < 150
    with torch.no_grad():
        for _ in range(3):
            logits(model.eval(), token_ids)
    assert not recall


@REENTRANT
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_apply_between_forward_and_backward(
    pair, token_ids, patched, logits, gradients, close, family, reentrant
):
    plain, model, sets = pair(family, reentrant)
    for one in (plain, model):
        loss = logits(one, token_ids).pow(2).sum()
        patched(one, sets)
        loss.backward()
    close(gradients(model), gradients(plain))


@REENTRANT
def test_the_same_inputs_in_two_calls(pair, token_ids, patched, gradients, close, reentrant):
    """Llama's first layer is given the caller's very tensor: it alone does not tell the calls apart."""
    plain, model, sets = pair("llama", reentrant)
    for one in (plain, model):
        patched(one, sets)
        inputs = one.get_input_embeddings()(token_ids).detach().requires_grad_()
        on = one(inputs_embeds=inputs, xpatch=xpatch.Rows(patches="neurons")).logits
        off = one(inputs_embeds=inputs, xpatch=xpatch.Rows(patches="__base__")).logits
        (on.pow(2).sum() + off.sum()).backward()
    close(gradients(model), gradients(plain))
