"""Forked children of a process that serves: they answer, apply and remove on their own, whatever the parent's threads were doing."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
import traceback
import warnings

import pytest
import torch

import xpatch
from xpatch.ops import pack_keys, patch_ffn
from xpatch.runtime import attach
from xpatch.runtime.attach import WRITERS, runtime_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")

RIGHT, WRONG, FAILED = 0, 3, 4


def in_child(work, seconds=30):
    """Run `work` in a forked child; what it returned, or an error. One that hangs is killed by its own alarm."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of Python >= 3.12: forks with threads, which is what is tested here
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(seconds)
            torch.set_num_threads(1)  # torch's own kernels hang in a child on OpenMP threads that stayed in the parent
            os._exit(RIGHT if work() else WRONG)
        except BaseException:
            traceback.print_exc()
            os._exit(FAILED)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return {RIGHT: True, WRONG: False, FAILED: "failed"}[os.WEXITSTATUS(status)]


@pytest.fixture
def served(tiny, token_ids, sets_for, patched, logits):
    """A model in use, with two threads and the native kernels; and a life of it that a child can check by itself."""
    torch.set_num_threads(2)
    model = tiny("bert")
    sets = sets_for(model)
    ids = torch.randint(5, 99, (32, 40))
    with torch.no_grad():
        base = logits(model, ids)
        both = logits(patched(model, sets), ids)
        one = logits(xpatch.remove(model, "deltas"), ids)
        patched(model, sets)

    def life():
        with torch.no_grad():
            right = [torch.equal(logits(model, ids), both)]
            right += [torch.equal(logits(xpatch.remove(model, "deltas"), ids), one)]
            right += [torch.equal(logits(model, ids, xpatch=xpatch.Rows(patches="__base__")), base)]
            right += [torch.equal(logits(xpatch.remove(model), ids), base) and runtime_of(model) is None]
            right += [torch.equal(logits(patched(model, sets), ids), both)]
        return all(right)

    return model, sets, life


def test_a_child_of_a_process_that_serves(served):
    model, _, life = served
    xpatch.status(model, count=True)
    assert in_child(life) is True
    assert life()  # and nothing of it happened in the parent


def test_a_childs_child(served):
    _, _, life = served
    assert in_child(lambda: life() and in_child(life) is True) is True


def test_the_native_pool_works_in_a_child():
    torch.set_num_threads(2)
    # Few columns: torch.equal of much more would wait for OpenMP threads that a child does not have.
    x, keys, bias, values = torch.randn(4096, 64), torch.randn(40, 64), torch.randn(40) - 10, torch.randn(40, 4)
    packed = pack_keys(keys, bias, "relu")
    expected = patch_ffn(x, keys, bias, values, "relu", packed)

    def work():
        torch.set_num_threads(2)
        return torch.equal(patch_ffn(x, keys, bias, values, "relu", packed), expected)

    assert in_child(work) is True


def test_a_fork_while_a_thread_writes(served):
    """The writer finishes first; its child finds the lock free."""
    _, _, life = served
    held, done = threading.Event(), threading.Event()

    def write():
        with WRITERS:
            held.set()
            time.sleep(0.3)
            done.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert held.wait(10)
    assert in_child(lambda: done.is_set() and life()) is True
    thread.join()


def test_forks_while_a_thread_swaps_without_end(served, token_ids, patched):
    """Never half a state: a child that applies again gets each set once."""
    model, sets, life = served
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            xpatch.remove(model)
            patched(model, sets)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        found = [in_child(lambda: bool(patched(model, sets)) and life()) for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert found == [True] * 5


@pytest.mark.parametrize("where", ["entering", "in a layer"])
def test_calls_of_the_parents_threads_are_over_in_the_child(tiny, token_ids, sets_for, patched, monkeypatch, where):
    model = tiny("gpt2-lm")
    with torch.no_grad():
        base = model(token_ids).logits
    patched(model, sets_for(model))
    inside, forked = threading.Event(), threading.Event()

    def wait(*ignored):
        inside.set()
        forked.wait(30)

    if where == "entering":
        resolve = attach.resolve
        monkeypatch.setattr(attach, "resolve", lambda *args: wait() or resolve(*args))
    else:
        handle = model.lm_head.register_forward_hook(wait)
    thread = threading.Thread(target=lambda: model.generate(token_ids, max_new_tokens=1))
    thread.start()
    assert inside.wait(30)
    monkeypatch.undo()
    if where != "entering":
        handle.remove()

    def work():
        xpatch.remove(model)
        with torch.no_grad():
            return runtime_of(model) is None and torch.equal(model(token_ids).logits, base)

    try:
        assert in_child(work) is True
        assert runtime_of(xpatch.remove(model)) is not None  # here the call still runs, and the hooks stay for it
    finally:
        forked.set()
        thread.join()
    assert runtime_of(model) is None


@pytest.mark.parametrize("held", ["digests", "identity", "fits", "graph", "firings", "languages"])
def test_a_lock_that_a_thread_of_the_parent_held_is_free(served, held):
    model, _, life = served
    xpatch.status(model, count=True)
    if held == "firings":
        lock = runtime_of(model).firings._lock
    else:
        room = "runtime" if held in ("graph", "languages") else "patches"
        name = {"identity": "_tokenizers_lock", "languages": "_LOCK"}.get(held, "_lock")
        lock = getattr(importlib.import_module(f"xpatch.{room}.{held}"), name)
    lock.acquire()
    try:
        assert in_child(lambda: lock.acquire(timeout=5) and (lock.release() or life())) is True
    finally:
        lock.release()
