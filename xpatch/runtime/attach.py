"""One model's patches at work: what is published, what each running call has pinned, and the hooks that are up.

Readers (model calls) take no lock; only one that finds another module where a patched layer was waits, to put the hooks there. Writers (apply, remove) prepare a snapshot, put up the hooks it needs, publish it by one
reference assignment, and take hooks down again once no running call can still need them.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xpatch.errors import ConflictError
from xpatch.models.anatomy import FFNSite, find_ffn_sites
from xpatch.models.surgery import Surgery
from xpatch.models.wrappers import plain_name, unwrapped
from xpatch.runtime import graph
from xpatch.runtime.calls import BASE_CALL, Call, Kind, Pins, Slot, ThreadState
from xpatch.runtime.capacity import Capacity, is_capturing
from xpatch.runtime.firings import Firings, first_token_sites
from xpatch.runtime.forking import survive_forks
from xpatch.runtime.hooks import Enter
from xpatch.runtime.install import Seat, install_base, install_point, seats_of
from xpatch.runtime.layer import add_patches
from xpatch.runtime.recompute import Recall
from xpatch.runtime.routing import Rows, is_switched_off, resolve, rows_in_context
from xpatch.runtime.snapshot import EMPTY, Point, Snapshot

if TYPE_CHECKING:
    from xpatch.runtime.prune import Pruning

#: Held by whoever changes what is published, on any model. Never taken by a model call that would have to wait for it.
WRITERS = threading.RLock()
survive_forks(WRITERS)
_MODULE_CALL = nn.Module._call_impl.__code__


class Runtime:
    """Everything xpatch has put on one model. It lives in the model's hooks alone, so a copied model has its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.snapshot = EMPTY
        #: Counts of which edits fired; None where counting is switched off.
        self.firings: Firings | None = Firings(cpu_only=True, first_token=first_token_sites(model))
        self.prepared: Mapping[str, Point] = {}  #: sites whose hooks stay up without patches
        self.capacity: Capacity | None = None  #: fixed buffers, for captured graphs
        self.pruning: Pruning | None = None  #: the last layer's hooks of an optimised model
        self.typical: dict[str, torch.Tensor] = {}  #: site -> typical inputs `[M, D]`, which keys are packed for
        self.places: list[str] = []  #: site names; a compiled graph knows a site by its index here
        self._sites: list[FFNSite] | None = None
        self._base: Surgery | None = None
        self._points: dict[Point, Surgery] = {}
        self._slots: dict[Point, Slot] = {}
        self._seats: dict[Point, list[Seat]] = {}
        self._start()

    def _start(self) -> None:
        """What belongs to this process and this very model: it is never copied or sent."""
        self.state = graph.register(self)
        self._thread = ThreadState()
        self._active: dict[tuple[int, Kind], weakref.ref[Pins]] = {}
        self._recall = Recall()
        self._untidy = False
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "model",
            "snapshot",
            "firings",
            "prepared",
            "capacity",
            "pruning",
            "typical",
            "places",
            "_sites",
            "_base",
            "_points",
            "_slots",
            "_seats",
        )
        return {key: vars(self)[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    @property
    def sites(self) -> list[FFNSite]:
        """The model's FFNs, looked for once; compiled parts keep the names they had before."""
        if self._sites is None:
            self._sites = [_plainly_named(site) for site in find_ffn_sites(self.model)]
        return self._sites

    def place_of(self, site: str) -> int:
        """The number by which a compiled graph knows a site."""
        if site not in self.places:
            self.places.append(site)
        return self.places.index(site)

    # Writers, with WRITERS held.

    def publish(self, snapshot: Snapshot, prepared: Mapping[str, Point] | None = None) -> None:
        """Make `snapshot` what every later call sees. If this fails the model is exactly as before."""
        base, points, slots = self._base, {}, {}
        wanted = {**(self.prepared if prepared is None else prepared), **snapshot.points}
        moved = [point for point in self._points if self._moved(point)]
        for seat in (seat for point in moved for seat in self._seats[point]):
            seat.strip(self)
        try:
            if base is None:
                base = Surgery()
                install_base(self, base)
            for point in wanted.values():
                if point not in self._points or point in moved:
                    points[point], slots[point] = Surgery(), Slot()
                    install_point(self, point, points[point], slots[point])
            if self.capacity is not None:
                self.capacity.write(snapshot)
        except BaseException:
            for surgery in points.values():
                surgery.undo()
            if base is not None and self._base is None:
                base.undo()
            raise
        self._base = base
        for point in moved:
            self._points[point].undo()
            self._seats[point] = []
        self._seats |= {point: seats_of(self.model, point) for point in points}
        self._points |= points
        self._slots |= slots
        if self.pruning is not None:
            self.pruning.step_back()
        if prepared is not None:
            self.prepared = prepared
        self.snapshot = snapshot
        self._tidy()

    def optimize(self, pruning: Pruning | None) -> None:
        """Put another pruning in the place of the one there is, or none."""
        before, self.pruning = self.pruning, pruning
        try:
            self.publish(self.snapshot)
        except BaseException:
            self.pruning = before
            if pruning is not None:
                pruning.undo()
            raise
        if before is not None:
            before.undo()

    def settle(self) -> None:
        """Take down hooks that nobody needs any more, if no call is running and no writer is at work. Never waits."""
        while self._untidy and not self._active and not self._recall and WRITERS.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                WRITERS.release()

    def _tidy(self) -> None:
        needed = {*self.snapshot.points.values(), *self.prepared.values()}
        unneeded = [point for point in self._points if point not in needed]
        # A set without parts is still applied: it can be named and removed.
        idle = not self.snapshot.sets and not self.prepared and self.pruning is None
        self._untidy = bool(unneeded) or idle  # before the look at running calls: one that ends now sees it
        for key in tuple(self._active):  # in one step: threads come and go meanwhile
            pins_of_thread = self._active.get(key)
            if pins_of_thread is not None and pins_of_thread() is None:  # the thread died in the middle of a call
                self._active.pop(key, None)
        if not self._untidy or self._active or self._recall:
            return
        self._untidy = False
        for point in unneeded:
            self._points.pop(point).undo()
            self._slots.pop(point, None)
            self._seats.pop(point, None)
        if idle and self._base is not None:
            self._base.undo()
            self._base = None

    def _moved(self, point: Point) -> bool:
        """Whether another module sits where the point's hooks were put on: an adapter layer, say, or one less."""
        return any(seat.taken for seat in self._seats.get(point, ()))

    def _follow(self) -> None:
        """Put the hooks on what sits in the patched places now. Raises `ConflictError` where such a place is gone."""
        try:
            with WRITERS:
                self.publish(self.snapshot)
        except AttributeError as error:
            raise ConflictError(
                f"a layer of {type(self.model).__name__} that has patches beside it is not there any more ({error}); remove them with "
                "xpatch.remove(model), or put the layer back"
            ) from error

    # Readers, from the hooks.

    def enter(self, kind: Kind, rows: Rows | None, batch: int | None) -> Call | None:
        """Pin the published snapshot unless an enclosing call has. Returns the pin of this kind that was there before."""
        pins = self._thread.pins
        outer = pins.get("generate")
        if kind != "generate":
            if outer is not None or (kind == "part" and "forward" in pins):
                return None
            pins.pop("part", None)  # left by a call that was interrupted outside Python's exceptions handling
        if any(map(self._moved, list(self._points))):
            self._follow()
        # Before the snapshot is read: a writer that missed this entry has published already.
        self._active[(threading.get_ident(), kind)] = weakref.ref(pins)
        try:
            pins[kind] = self._begin(kind, rows, batch)
        except BaseException:
            if outer is None:
                self._active.pop((threading.get_ident(), kind), None)
                self.settle()
            raise
        return outer

    def exit(self, kind: Kind, outer: Call | None = None) -> None:
        """Let go of this kind's pin; `outer`, where given, takes its place again."""
        here = self._thread
        if outer is not None:
            here.pins[kind] = outer
            return
        if here.pins.pop(kind, None) is None:
            return
        for slot in list(self._slots.values()):
            slot.x = None  # of an FFN that failed between its halves
        self._active.pop((threading.get_ident(), kind), None)
        if self._untidy:
            self.settle()

    def call(self, module: nn.Module | None = None) -> Call:
        """The call that this thread is in; outside of one, what is published now, but where a backward pass computes `module` again
        the call in which it was computed first."""
        pinned = self._thread.pins.outermost()
        if module is not None and (torch.is_grad_enabled() or module.training):
            return self._recall.call(pinned, lambda: self._begin("part", None, None), module.training)
        return pinned or self._begin("part", None, None)

    def keep(self, site: str, slot: Slot, x: torch.Tensor, module: nn.Module) -> None:
        """Put the input of an FFN, which begins with `module`, into `slot`, where the call has patches there."""
        call = self.call(module)
        slot.x = x if site in call.snapshot.at or call.epoch is not None else None

    def add(self, site: str, x: torch.Tensor, y: torch.Tensor, call: Call) -> torch.Tensor | None:
        """The patched output, or None (as it is) where `call` pinned no part here."""
        if call.epoch is not None and self.capacity is not None:
            return self.capacity.add(site, x, y, call.epoch)
        steps = call.snapshot.steps.get(site)
        return None if steps is None else add_patches(steps, x, y, call.route, self.firings)

    def _begin(self, kind: Kind, rows: Rows | None, batch: int | None) -> Call:
        if is_switched_off(self.model) or (self._thread.newcomer and self._began_before_the_hooks(kind)):
            return BASE_CALL
        snapshot = self.snapshot
        chosen = rows if rows is not None else rows_in_context()
        if is_capturing():
            return Call(snapshot, epoch=Capacity.latched(self.capacity, snapshot, chosen))
        route = resolve(chosen, tuple(snapshot.sets), batch)
        if snapshot.masked and route.languages is None:
            self._warn_of_masks(snapshot)
        return Call(snapshot, route)

    def _began_before_the_hooks(self, kind: Kind) -> bool:
        """Whether this thread is in a call that began when no hook was up: it must not see half of them."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            # This call's own frame is on the stack when its entry asks, so there only an outer `generate` tells.
            name_fits = frame.f_code.co_name == "generate" or (kind == "part" and frame.f_code is _MODULE_CALL)
            if name_fits and frame.f_locals.get("self") is self.model:
                return True
            frame = frame.f_back
        self._thread.newcomer = False
        return False

    def _warn_of_masks(self, snapshot: Snapshot) -> None:
        for name in snapshot.masked:
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"patch set {name!r} has language masks but this call names no languages: they are left out. Pass "
                    "xpatch=xpatch.Rows(languages=[...]) or use `with xpatch.rows(languages=...)`",
                    UserWarning,
                    stacklevel=2,
                )


def _plainly_named(site: FFNSite) -> FFNSite:
    names: dict[str, Any] = {key: plain_name(value) for key, value in vars(site).items() if isinstance(value, str)}
    return replace(site, **names)


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime whose hooks are on `model`, or on the model behind a wrapper; None without one."""
    for hook in unwrapped(model)._forward_pre_hooks.values():
        if isinstance(hook, Enter) and hook.kind == "forward":
            return hook.runtime
    return None
