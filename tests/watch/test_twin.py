"""The twin shares weights and nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import xpatch
from xpatch import PatchNeurons, PatchSet
from xpatch.runtime.attach import runtime_of
from xpatch.watch.twin import _tensors, twin_of

SITE = "bert.encoder.layer.1"


def patches(seed: int = 0) -> PatchSet:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randn(*shape, generator=draw) for shape in ((5, 32), (5,), (5, 32))]
    return PatchSet(parts={"part": PatchNeurons(SITE, *rows, "relu")})


def test_every_tensor_is_shared_and_no_module(tiny):
    model = tiny("bert")
    twin = twin_of(model)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in twin.buffers()} == {id(b) for b in model.buffers()}
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}
    assert twin.config.to_dict() == model.config.to_dict()


@torch.no_grad()
def test_the_twin_of_a_patched_model_is_its_base(tiny, token_ids):
    model = tiny("bert")
    base = model(token_ids).logits
    xpatch.apply(model, patches(), name="a")
    served = model(token_ids).logits
    twin = twin_of(model)
    assert torch.equal(twin(token_ids).logits, base) and runtime_of(twin) is None
    xpatch.apply(twin, patches(1), name="b")
    assert torch.equal(model(token_ids).logits, served) and xpatch.status(model).names == ("a",)


def test_modes_are_its_own(tiny):
    model = tiny("bert").train()
    assert not twin_of(model).training and model.training and model.bert.encoder.layer[0].training


@torch.no_grad()
def test_compiled_parts_are_plain(tiny, token_ids):
    model = tiny("bert")
    expected = model(token_ids).logits
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    whole = torch.compile(model, backend="eager")
    twin = twin_of(whole)
    assert not any("_orig_mod" in module._modules for module in twin.modules())
    assert torch.equal(twin(token_ids).logits, expected)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}


@torch.no_grad()
def test_behind_a_wrapper(tiny, token_ids):
    model = tiny("bert")
    assert torch.equal(twin_of(nn.DataParallel(model))(token_ids).logits, model(token_ids).logits)


def test_tensors_a_layer_keeps_elsewhere_are_shared():
    """Quantised layers keep tensors as plain attributes and in state objects."""

    class State:
        def __init__(self) -> None:
            self.scale = torch.ones(3)

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state, self.packed = State(), torch.zeros(4, dtype=torch.uint8)

    layer = Quantised()
    assert {id(t) for t in _tensors(layer)} >= {id(layer.state.scale), id(layer.packed)}
    twin = twin_of(layer)
    assert twin.state.scale is layer.state.scale and twin.packed is layer.packed


@pytest.mark.parametrize("rounds", [20])
def test_twins_are_made_while_others_swap_and_serve(tiny, token_ids, rounds):
    model = tiny("bert")
    with torch.no_grad():
        base = model(token_ids).logits
    failures, done = [], threading.Event()

    def swap():
        while not done.is_set():
            xpatch.apply(model, patches(), name="a")
            xpatch.remove(model, "a")

    def serve():
        while not done.is_set():
            with torch.no_grad():
                model(token_ids)

    def run(work):
        try:
            work()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in (swap, serve)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(rounds):
            with torch.no_grad():
                assert torch.equal(twin_of(model)(token_ids).logits, base)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
