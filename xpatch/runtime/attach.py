"""One model's patches at work: what is published, what each running call has pinned, and the hooks that are up.

Readers (model calls) take no lock. Writers (apply, remove) prepare a snapshot, put up the hooks it needs, publish it by one
reference assignment, and take hooks down again once no running call can still need them.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

from xpatch.models.surgery import Surgery
from xpatch.runtime.firings import Firings
from xpatch.runtime.hooks import Add, Beside, Enter, Exit, Generate, Keep
from xpatch.runtime.layer import add_patches
from xpatch.runtime.routing import EVERYTHING, Route, Rows, batch_of, is_switched_off, resolve, rows_in_context
from xpatch.runtime.snapshot import EMPTY, Point, Snapshot

Kind = Literal["generate", "forward", "part"]

#: Held by whoever changes what is published, on any model. Never taken by a model call that would have to wait for it.
WRITERS = threading.RLock()
_MODULE_CALL = nn.Module._call_impl.__code__


class Call:
    """One outermost call: the snapshot it sees from beginning to end, and what its rows get."""

    __slots__ = ("route", "snapshot")

    def __init__(self, snapshot: Snapshot, route: Route = EVERYTHING) -> None:
        self.snapshot = snapshot
        self.route = route


_BASE_CALL = Call(EMPTY)


class _Pins(dict[Kind, Call]):
    """The pins of one thread: gone when the thread is (a plain dict has no weak references)."""


class _Thread(threading.local):
    """What one thread is in the middle of: its pins, and FFN inputs between up and down.

    `newcomer` until it is known that the thread is in no call that began before the hooks were up.
    """

    def __init__(self) -> None:
        self.pins = _Pins()
        self.inputs: dict[str, torch.Tensor] = {}
        self.newcomer = True


class Runtime:
    """Everything xpatch has put on one model. It lives in the model's hooks alone, so a copied model has its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.snapshot = EMPTY
        self.firings: Firings | None = None  #: counts of which edits fired; None while nothing is counted
        self._base: Surgery | None = None
        self._points: dict[Point, Surgery] = {}
        self._forget_calls()

    def _forget_calls(self) -> None:
        self._thread = _Thread()
        self._active: dict[tuple[int, Kind], weakref.ref[_Pins]] = {}
        self._untidy = False
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {key: vars(self)[key] for key in ("model", "snapshot", "firings", "_base", "_points")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_calls()

    # Writers, with WRITERS held.

    def publish(self, snapshot: Snapshot) -> None:
        """Make `snapshot` what every later call sees. If this fails the model is exactly as before."""
        base, points = self._base, {}
        try:
            if base is None:
                base = Surgery()
                self._install_base(base)
            for point in snapshot.points.values():
                if point not in self._points:
                    points[point] = Surgery()
                    self._install_point(point, points[point])
        except BaseException:
            for surgery in points.values():
                surgery.undo()
            if base is not None and self._base is None:
                base.undo()
            raise
        self._base = base
        self._points |= points
        self.snapshot = snapshot
        self._tidy()

    def settle(self) -> None:
        """Take down hooks that nobody needs any more, if no call is running and no writer is at work. Never waits."""
        while self._untidy and not self._active and WRITERS.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                WRITERS.release()

    def _tidy(self) -> None:
        needed = set(self.snapshot.points.values())
        unneeded = [point for point in self._points if point not in needed]
        idle = not self.snapshot.sets  # a set without parts is still applied: it can be named and removed
        self._untidy = bool(unneeded) or idle  # before the look at running calls: one that ends now sees it
        for key, pins_of_thread in list(self._active.items()):
            if pins_of_thread() is None:  # the thread died in the middle of a call
                self._active.pop(key, None)
        if not self._untidy or self._active:
            return
        self._untidy = False
        for point in unneeded:
            self._points.pop(point).undo()
        if idle and self._base is not None:
            self._base.undo()
            self._base = None

    def _install_base(self, surgery: Surgery) -> None:
        # An exit without its entry does nothing; an entry without its exit would leave a pin. Exits go up first, come down last.
        parts = [child for child in self.model.children() if any(True for _ in child.children())]
        for child in parts:
            surgery.after(child, Exit(self, "part"), always=True)
        surgery.after(self.model, Exit(self, "forward"), always=True)
        for child in parts:
            surgery.before(child, Enter(self, "part"), first=True, kwargs=True)
        surgery.before(self.model, Enter(self, "forward"), first=True, kwargs=True)
        own = vars(self.model).get("generate")
        if own is not None or callable(getattr(type(self.model), "generate", None)):
            surgery.attribute(self.model, "generate", Generate(self, own))

    def _install_point(self, point: Point, surgery: Surgery) -> None:
        adds = self.model.get_submodule(point.adds)
        if point.reads == point.adds:
            surgery.after(adds, Beside(self, point.site))
        else:
            surgery.after(adds, Add(self, point.site))
            surgery.before(self.model.get_submodule(point.reads), Keep(self, point.site))

    # Readers, from the hooks.

    def enter(self, kind: Kind, rows: Rows | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """Pin the published snapshot unless an enclosing call has. Returns the pin of this kind that was there before."""
        pins = self._thread.pins
        outer = pins.get("generate")
        if kind != "generate":
            if outer is not None or (kind == "part" and "forward" in pins):
                return None
            pins.pop("part", None)  # left by a call that was interrupted outside Python's exceptions handling
        key = (threading.get_ident(), kind)
        self._active[key] = weakref.ref(
            pins
        )  # before the snapshot is read: a writer that missed this entry has published already
        try:
            pins[kind] = self._begin(kind, rows, args, kwargs)
        except BaseException:
            if outer is None:
                self._active.pop(key, None)
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
        here.inputs.clear()
        self._active.pop((threading.get_ident(), kind), None)
        if self._untidy:
            self.settle()

    def keep(self, site: str, x: torch.Tensor) -> None:
        """The input of an FFN, until its down projection has run."""
        if site in self._call().snapshot.at:
            self._thread.inputs[site] = x

    def add(self, site: str, x: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor | None:
        """The patched output, or None (as it is) where the call pinned no part here. Without `x`: the input kept before."""
        if x is None:
            x = self._thread.inputs.pop(site, None)
        call = self._call()
        parts = call.snapshot.at.get(site)
        if parts is None or x is None:
            return None
        return add_patches(parts, x, y, call.route, self.firings)

    def _call(self) -> Call:
        pins = self._thread.pins
        call = pins.get("generate") or pins.get("forward") or pins.get("part")
        return call if call is not None else self._begin("part", None, (), {})

    def _begin(self, kind: Kind, rows: Rows | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        if is_switched_off(self.model) or (self._thread.newcomer and self._began_before_the_hooks(kind)):
            return _BASE_CALL
        snapshot = self.snapshot
        chosen = rows if rows is not None else rows_in_context()
        route = resolve(chosen, tuple(snapshot.sets), batch_of(args, kwargs))
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


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime whose hooks are on `model`, or None."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, Enter) and hook.kind == "forward":
            return hook.runtime
    return None
