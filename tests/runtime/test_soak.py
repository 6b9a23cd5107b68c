"""Many threads infer while two writers swap: a short soak, and one of a runtime that is broken on purpose."""

from __future__ import annotations

import sys

import torch

from xpatch.benchmarks import soak
from xpatch.runtime.attach import Runtime
from xpatch.runtime.calls import Call
from xpatch.runtime.routing import is_switched_off


def test_eight_threads_and_300_swaps():
    threads, switch = torch.get_num_threads(), sys.getswitchinterval()
    found = soak.run(threads=8, swaps=300, seed=1, per_swap=1, progress=False)
    wrong = {key: found[key] for key in ("torn", "stale", "errors", "deadlocks")}
    assert not any(wrong.values()), found["models"]
    assert found["restored"]
    assert found["swaps"] == 300 and found["outputs"] >= 300
    assert [part["name"] for part in found["models"]] == ["encoder", "decoder"]
    for part in found["models"]:
        assert sum(count > 0 for count in part["states"].values()) >= 4, part["states"]
    assert (torch.get_num_threads(), sys.getswitchinterval()) == (threads, switch)


def test_a_runtime_without_pins_is_caught(monkeypatch):
    """Each site looks at what is published at that moment, as it would if calls pinned nothing."""
    pinned = Runtime.call

    def unpinned(runtime, *within):
        call = pinned(runtime, *within)
        return call if is_switched_off(runtime.model) else Call(runtime.snapshot, call.route)

    monkeypatch.setattr(Runtime, "call", unpinned)
    found = soak.run(threads=4, swaps=120, per_swap=1, progress=False, subjects=(soak.encoder,))
    assert found["torn"] > 0
