"""torch.utils.checkpoint called by hand, and torch's own wrapper: other segments than the layers of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import xpatch

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])


@pytest.fixture
def model(tiny):
    return tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double().train()


@REENTRANT
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("swap", [False, True])
def test_torchs_checkpoint_by_hand(model, token_ids, sets_for, patched, gradients, close, swap, mode, reentrant):
    """Around the whole encoder, called past the model; nested with each layer's own."""
    model.train(mode == "train")
    sets, found = sets_for(model), []
    for again in (False, True):
        one = patched(copy.deepcopy(model), sets)
        if again and mode == "train":
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        embedded = one.bert.embeddings(token_ids).detach().requires_grad_()

        def run(x, one=one):
            return one.bert.encoder(x).last_hidden_state

        hidden = checkpoint(run, embedded, use_reentrant=reentrant) if again else run(embedded)
        if swap and not (reentrant and mode == "eval"):  # computed first without gradients: cannot be told from serving
            xpatch.remove(one)
        hidden.pow(2).sum().backward()
        found.append(gradients(one))
    close(*found)


@REENTRANT
def test_one_module_checkpointed_for_many_inputs(model, token_ids, sets_for, patched, gradients, close, reentrant):
    """The function is the same in all calls; their inputs tell them apart."""
    sets, found = sets_for(model), []
    for again in (False, True):
        one = patched(copy.deepcopy(model), sets)
        losses = []
        for choice in (sets, {"neurons": sets["neurons"]}, {}):
            xpatch.remove(one)
            patched(one, choice)
            x = one.bert.embeddings(token_ids)
            layer = one.bert.encoder.layer[1]
            out = checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x)
            losses.append((out if isinstance(out, torch.Tensor) else out[0]).pow(2).sum())
        sum(losses).backward()
        found.append(gradients(one))
    close(*found)


def test_torchs_checkpoint_wrapper(model, token_ids, sets_for, patched, logits, gradients, close):
    """As FSDP users wrap layers: another module takes each layer's place."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    plain, sets = copy.deepcopy(model), sets_for(model)
    kind = type(model.bert.encoder.layer[0])
    patched(plain, sets), patched(model, sets)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: isinstance(module, kind)
    )
    for one in (plain, model):
        loss = logits(one, token_ids, xpatch=xpatch.Rows(patches=["neurons", "__base__", None])).pow(2).sum()
        xpatch.remove(one)
        loss.backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in gradients(model).items()}
    close(found, gradients(plain))
