"""What one thread is in the middle of: the call it has pinned, and the tensors a site keeps between its two halves."""

from __future__ import annotations

import threading
from typing import Any, Literal

import torch

from xpatch.runtime.routing import EVERYTHING, Route
from xpatch.runtime.snapshot import EMPTY, Snapshot

Kind = Literal["generate", "forward", "part"]


class Call:
    """One outermost call: the snapshot it sees from beginning to end, and what its rows get.

    epoch `[1]`: which half of the capacity buffers a captured graph reads; None outside a capture. number: how a compiled
    backward pass finds the call again; 0 until one needs it.
    """

    __slots__ = ("epoch", "number", "route", "snapshot")

    def __init__(self, snapshot: Snapshot, route: Route = EVERYTHING, epoch: torch.Tensor | None = None) -> None:
        self.snapshot = snapshot
        self.route = route
        self.epoch = epoch
        self.number = 0


BASE_CALL = Call(EMPTY)


class Pins(dict[Kind, Call]):
    """The pins of one thread: gone when the thread is (a plain dict has no weak references)."""

    def outermost(self) -> Call | None:
        return self.get("generate") or self.get("forward") or self.get("part")


class ThreadState(threading.local):
    """pins: this thread's calls.

    `newcomer` until it is known that the thread is in no call that began before the hooks were up.
    """

    def __init__(self) -> None:
        self.pins = Pins()
        self.newcomer = True


class Slot(threading.local):
    """The input of one FFN, from its up projection until its down projection has run. One value per thread, so that calls
    never meet; a compiled graph passes the tensor on by itself and leaves None here."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        x, self.x = self.x, None
        return x

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, ()
