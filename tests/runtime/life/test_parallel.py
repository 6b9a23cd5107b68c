"""Data parallelism: every replica computes with the patches of its model, and one string of rows holds in all of them."""

from __future__ import annotations

import copy
import multiprocessing
import threading

import pytest
import torch
from torch import nn

import xpatch
from xpatch.runtime.attach import runtime_of

FAMILIES = ("bert", "gpt2-lm", "llama", "t5")


def replicas_of(model, count):
    """As `torch.nn.parallel.replicate` makes them, without the copy to other devices."""
    replicas = [{} for _ in range(count)]
    for name, module in model.named_modules():
        for found in replicas:
            found[name] = module._replicate_for_data_parallel()
    for found in replicas:
        for name, module in model.named_modules():
            twin = found[name]
            for child in module._modules:
                twin._modules[child] = found[f"{name}.{child}" if name else child]
            for key, parameter in module._parameters.items():
                setattr(twin, key, None if parameter is None else parameter.detach().clone())
            for key, buffer in module._buffers.items():
                twin._buffers[key] = None if buffer is None else buffer.clone()
    return [found[""] for found in replicas]


def in_threads(replicas, ids, **more):
    """The answers of the replicas to their shares of the batch, each in its own thread (as DataParallel runs them), or the errors."""
    answers = [None] * len(replicas)

    def run(index, share):
        try:
            with torch.no_grad():
                decoder = {"decoder_input_ids": share} if replicas[index].config.is_encoder_decoder else {}
                answers[index] = replicas[index](input_ids=share, **decoder, **more).logits
        except Exception as error:
            answers[index] = error

    shares = ids.chunk(len(replicas))
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_in_threads(tiny, sets_for, patched, logits, no_trace, family):
    model, ids = tiny(family), torch.randint(5, 99, (4, 7))
    base, sets = copy.deepcopy(model), sets_for(model)
    patched(model, sets)

    def whole(**more):
        return torch.cat([logits(model, share, **more) for share in ids.chunk(2)])

    replicas = replicas_of(model, 2)
    assert torch.equal(torch.cat(in_threads(replicas, ids)), whole())
    for name in ("neurons", "__base__"):
        rows = xpatch.Rows(patches=name)
        assert torch.equal(torch.cat(in_threads(replicas, ids, xpatch=rows)), whole(xpatch=rows))
    for error in in_threads(replicas, ids, xpatch=xpatch.Rows(patches=["neurons", "deltas", None, None])):
        assert isinstance(error, xpatch.MismatchError)
        assert "4 entries but the batch has 2 rows" in str(error) and "DataParallel splits batches" in str(error)

    xpatch.remove(model, "deltas")  # replicas are made anew for each call, but those there are follow too
    assert torch.equal(torch.cat(in_threads(replicas, ids)), whole())
    no_trace(model, base, ids)


@torch.no_grad()
@pytest.mark.parametrize("patch_first", [True, False])
def test_data_parallel_without_accelerators(tiny, token_ids, sets_for, patched, no_trace, patch_first):
    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model)
    if patch_first:
        patched(model, sets)
    wrapped = nn.DataParallel(model)
    if not patch_first:
        patched(wrapped, sets)
    assert xpatch.status(wrapped).names == tuple(sets) and runtime_of(wrapped) is runtime_of(model)
    expected = model(token_ids).logits
    assert torch.equal(wrapped(token_ids).logits, expected)
    rows = xpatch.Rows(patches=["__base__", None, "neurons"])
    assert torch.equal(wrapped(token_ids, xpatch=rows).logits, model(token_ids, xpatch=rows).logits)
    with xpatch.disabled(wrapped):
        assert torch.equal(wrapped(token_ids).logits, base(token_ids).logits)
    xpatch.remove(wrapped)
    no_trace(model, base, token_ids)


@pytest.fixture
def one_process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("patch_first", [True, False])
def test_distributed_data_parallel(one_process_group, tiny, token_ids, sets_for, patched, no_trace, patch_first):
    model = tiny("bert").double()
    base, sets = copy.deepcopy(model), sets_for(model)
    alone = patched(copy.deepcopy(model), sets)
    if patch_first:
        patched(model, sets)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if not patch_first:
        patched(wrapped, sets)
    rows = xpatch.Rows(patches=["__base__", None, "neurons"])
    for one in (wrapped, alone):
        one(token_ids).logits.pow(2).sum().backward()
        one(token_ids, xpatch=rows).logits.pow(2).sum().backward()
    for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-10, rtol=1e-8, msg=name)
    with torch.no_grad(), xpatch.disabled(wrapped):
        assert torch.equal(wrapped(token_ids).logits, base(token_ids).logits)
    model.zero_grad()
    xpatch.remove(wrapped)
    no_trace(model, base, token_ids)


def work(rank, rendezvous, model, ids, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = copy.deepcopy(model)  # what torch sends to a child is shared memory
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    share = ids.chunk(2)[rank]
    for step in range(2):
        optimizer.zero_grad()
        wrapped(share, xpatch=xpatch.Rows(patches="neurons" if step else None)).logits.pow(2).mean().backward()
        optimizer.step()
    xpatch.remove(wrapped)
    queue.put((rank, {name: tensor.numpy() for name, tensor in model.state_dict().items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_one_patched_model(tiny, tmp_path, sets_for, patched):
    context = multiprocessing.get_context("spawn")
    model, ids, queue = tiny("bert").double(), torch.randint(5, 99, (4, 7)), context.Queue()
    patched(model, sets_for(model))
    children = [
        context.Process(target=work, args=(rank, tmp_path / "rendezvous", model, ids, queue)) for rank in range(2)
    ]
    for child in children:
        child.start()
    found = dict(queue.get(timeout=240) for _ in children)
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        rows = xpatch.Rows(patches="neurons" if step else None)
        (sum(model(share, xpatch=rows).logits.pow(2).mean() for share in ids.chunk(2)) / 2).backward()
        optimizer.step()
    for name, expected in model.state_dict().items():
        for rank in range(2):
            torch.testing.assert_close(torch.from_numpy(found[rank][name]), expected, atol=1e-9, rtol=1e-7)
