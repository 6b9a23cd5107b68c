"""Captured graphs and capacity buffers. On a machine without a GPU a recorder replays a call's kernels on fixed addresses."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import xpatch
from xpatch.errors import ConflictError, MismatchError
from xpatch.runtime.attach import runtime_of
from xpatch.runtime.capacity import capture


class Recorded(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: remembers every kernel with the addresses it read and wrote, and replays them."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.kernels.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.kernels:
            read = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            if all(t.untyped_storage()._cdata in read for t in written):
                if function._schema.is_mutable:
                    function(*args, **kwargs)
                continue  # a view shows what was written under it
            for old, new in zip(written, tree_leaves(function(*args, **kwargs)), strict=True):
                old.copy_(new)


def recorded(model, ids):
    with capture(), Recorded() as graph:
        logits = model(ids).logits

    def run():
        graph.replay()
        return logits.clone()

    return run


def cuda_graph(model, ids):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(ids).logits

    def run():
        graph.replay()
        return logits.clone()

    return run


@pytest.fixture(params=["cpu", "cuda"])
def captured(request):
    """(device, capture) for each kind of capture at hand."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param, recorded if request.param == "cpu" else cuda_graph


def both_layers(model, patch_of, seed):
    parts = {str(layer): patch_of(model, "neurons", seed=seed + layer, layer=layer).parts["part"] for layer in (0, 1)}
    return xpatch.PatchSet(parts=parts)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_replays_see_the_patches_swapped_between_them(tiny, token_ids, patch_of, captured, family):
    device, capture_call = captured
    ids = token_ids.to(device)
    model = xpatch.prepare(tiny(family).to(device), "all", capacity=12)
    base = model(ids).logits
    xpatch.apply(model, both_layers(model, patch_of, 1), name="a")
    replay = capture_call(model, ids)
    for change in (
        lambda: None,
        lambda: xpatch.apply(model, both_layers(model, patch_of, 5), name="a"),
        lambda: xpatch.apply(model, patch_of(model, "neurons", seed=8), name="b"),
        lambda: xpatch.remove(model, "a"),
    ):
        change()
        torch.testing.assert_close(replay(), model(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(replay(), base)
    xpatch.remove(model)
    assert torch.equal(replay(), base) and torch.equal(model(ids).logits, base)
    xpatch.prepare(model, off=True)
    assert runtime_of(model) is None and torch.equal(model(ids).logits, base)


@torch.no_grad()
def test_a_swap_in_the_middle_of_a_replay_is_seen_by_the_next_one(tiny, token_ids, patch_of):
    model = xpatch.prepare(tiny("bert"), "all", capacity=12)
    first, second = (both_layers(model, patch_of, seed) for seed in (1, 5))
    xpatch.apply(model, first, name="a")
    expected = model(token_ids).logits
    with capture(), Recorded() as graph:
        logits = model(token_ids).logits
    kernels, middle = graph.kernels, len(graph.kernels) // 2
    graph.kernels = kernels[:middle]
    graph.replay()
    xpatch.apply(model, second, name="a")  # between the two patched layers of one replay
    graph.kernels = kernels[middle:]
    graph.replay()
    assert torch.allclose(logits, expected, atol=1e-5)
    graph.kernels = kernels
    graph.replay()
    assert torch.allclose(logits, model(token_ids).logits, atol=1e-5) and not torch.allclose(logits, expected)


def several(model, patch_of, count):
    """A set of `count` parts of 5 neurons each at the last FFN."""
    return xpatch.PatchSet(parts={f"p{i}": patch_of(model, "neurons", seed=40 + i).parts["part"] for i in range(count)})


@torch.no_grad()
def test_the_live_count_follows_swaps_and_what_lies_behind_it_is_never_read(tiny, token_ids, patch_of, captured):
    device, capture_call = captured
    ids = token_ids.to(device)
    model = xpatch.prepare(tiny("bert").to(device), capacity=20)
    base = model(ids).logits
    replay = capture_call(model, ids)
    assert torch.equal(replay(), base)
    room = runtime_of(model).capacity
    (site,) = room.buffers
    for count in (1, 4, 2, 3, 0, 1):
        if count:
            xpatch.apply(model, several(model, patch_of, count), name="a")
        else:
            xpatch.remove(model, "a")
        half = int(room.published)
        assert int(room.live[site][half]) == 5 * count
        for buffer in room.buffers[site]:  # NaN would spread to every logit
            buffer[half, 5 * count :] = float("nan")
            buffer[1 - half] = float("nan")
        torch.testing.assert_close(replay(), model(ids).logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(replay(), base) == (count == 0)


@torch.no_grad()
def test_a_capture_copies_no_buffer(tiny, token_ids, patch_of):
    model = xpatch.prepare(tiny("bert"), "all", capacity=12)
    xpatch.apply(model, both_layers(model, patch_of, 1), name="a")
    with capture(), Recorded() as graph:
        model(token_ids)
    buffers = {b.untyped_storage()._cdata for room in runtime_of(model).capacity.buffers.values() for b in room}
    readers = [
        function
        for function, args, kwargs, _ in graph.kernels
        if any(
            isinstance(t, torch.Tensor) and t.untyped_storage()._cdata in buffers for t in tree_leaves((args, kwargs))
        )
    ]
    assert readers == [torch.ops.xpatch.patch_ffn_capacity.default] * 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_rounded_once(tiny, token_ids, patch_of, captured, dtype):
    device, capture_call = captured
    ids = token_ids.to(device)
    model = xpatch.prepare(tiny("bert").to(device, dtype), capacity=12)
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    replay = capture_call(model, ids)
    torch.testing.assert_close(replay(), model(ids).logits)


@torch.no_grad()
def test_disabled_while_capturing_captures_the_base(tiny, token_ids, patch_of):
    model = xpatch.prepare(tiny("bert"), capacity=8)
    base = model(token_ids).logits
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    with xpatch.disabled(model):
        replay = recorded(model, token_ids)
    assert torch.equal(replay(), base)


@torch.no_grad()
def test_what_a_capture_cannot_hold_is_refused(tiny, token_ids, patch_of):
    model = tiny("bert")
    base = model(token_ids).logits
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    with capture(), pytest.raises(ConflictError, match=r"xpatch\.prepare\(model, capacity=N\) before the capture"):
        model(token_ids)
    with pytest.raises(MismatchError, match="at least 1 neuron, found 0"):
        xpatch.prepare(model, capacity=0)
    with pytest.raises(MismatchError, match="at least one FFN among the sites, found none"):
        xpatch.prepare(model, "bert.encoder.layer.1.output.dense", capacity=4)
    for wrong in ("4", True, 2.0):
        with pytest.raises(MismatchError, match="give a whole number"):
            xpatch.prepare(model, capacity=wrong)
    with pytest.raises(MismatchError, match="names of FFNs or linear layers, or 'all'; found 5"):
        xpatch.prepare(model, 5)
    with pytest.raises(MismatchError, match="no linear layer named 'bert.nowhere'"):
        xpatch.prepare(model, ["bert.nowhere"])
    with pytest.raises(ConflictError, match="5 patch neurons at .* room for 4"):
        xpatch.prepare(model, capacity=4)
    assert runtime_of(model).capacity is None
    xpatch.prepare(model, capacity=8)
    patched = model(token_ids).logits
    with capture(), pytest.raises(ConflictError, match="row choice"):
        model(token_ids, xpatch=xpatch.Rows(patches="a"))
    for refused, found in (
        (patch_of(model, "lowrank"), "room at"),
        (patch_of(model, "neurons", layer=0), "room at"),
        (patch_of(model, "neurons", mask=True), "relu with a language mask"),
        (patch_of(model, "neurons", gate="ball"), "relu with a gate"),
        (patch_of(model, "neurons", seed=3), "10 patch neurons"),
    ):
        with pytest.raises(ConflictError, match=found):
            xpatch.apply(model, refused, name="b")
        assert xpatch.status(model).names == ("a",)
        assert torch.equal(model(token_ids).logits, patched)
    xpatch.remove(model)
    assert torch.equal(model(token_ids).logits, base)


@torch.no_grad()
def test_capturing_is_a_matter_of_one_thread(tiny, token_ids, patch_of):
    model = tiny("bert")
    xpatch.apply(model, patch_of(model, "neurons"))
    patched, seen = model(token_ids).logits, []
    with capture():
        thread = threading.Thread(target=lambda: seen.append(torch.no_grad()(model)(token_ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], patched)
