"""Gradient checkpointing: a segment that is computed again in the backward pass sees the call it was first computed in.

By then that call has ended, another snapshot may be published, and the rows' languages are gone. What both computations share is
the function that `torch.utils.checkpoint` was given, and its inputs; both are found on the stack, where a patched layer computes.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from xpatch.runtime.calls import BASE_CALL, Call

_PURGE_AT = 64
# Functions of torch.utils.checkpoint that run a segment, and under which name they hold its function. The last two run it again.
_RUNS = {"checkpoint": "function", "forward": "run_function", "recompute_fn": "fn", "backward": "ctx"}
_AGAIN = ("recompute_fn", "backward")


class _Segment(NamedTuple):
    """One checkpointed segment on the stack. x: the first tensor it was given; runner: what runs it, a key of `_RUNS`."""

    function: Any
    x: torch.Tensor | None
    runner: str


class _Known(NamedTuple):
    function: weakref.ref[Any]
    storage: Any  #: of the first tensor, for a function that outlives its calls; None for one made for a single call
    call: Call

    @property
    def over(self) -> bool:
        return self.function() is None or (self.storage is not None and self.storage.expired())


class Recall:
    """Checkpointed segment -> the call that computed it, for as long as a backward pass may compute it again."""

    def __init__(self) -> None:
        self._calls: dict[tuple[int, int], _Known] = {}
        self._purge_at = _PURGE_AT

    def call(self, pinned: Call | None, begin: Callable[[], Call], training: bool) -> Call:
        """The call that a patched layer computes in: the one this thread has pinned; in a backward pass the one that is computed
        again; else what `begin` gives. training: whether the layer is in training mode."""
        segments = _segments()
        if pinned is None:
            known = (self._calls.get(_key(segment)) for segment in segments)
            pinned = next((found.call for found in known if found is not None and not found.over), None)
        if pinned is None:
            again = {segment.runner for segment in segments}.intersection(_AGAIN)
            # What is computed again and was never seen was computed before any patch was there. Only segments of a model in eval mode
            # that `use_reentrant` runs without gradients are not looked for.
            pinned = BASE_CALL if again and (training or "recompute_fn" in again) else begin()
        for segment in segments:
            self._remember(segment, pinned)
        return pinned

    def __bool__(self) -> bool:
        """Whether some segment may still be computed again."""
        if self._calls:
            self._purge()
        return bool(self._calls)

    def _remember(self, segment: _Segment, call: Call) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = None
        if _outlives_its_calls(segment.function):
            if segment.x is None:
                return
            storage = StorageWeakRef(segment.x.untyped_storage())
        self._calls[_key(segment)] = _Known(weakref.ref(segment.function), storage, call)
        if len(self._calls) >= self._purge_at:
            self._purge()
            self._purge_at = 2 * len(self._calls) + _PURGE_AT

    def _purge(self) -> None:
        for key, known in list(self._calls.items()):
            if known.over:
                self._calls.pop(key, None)


def is_checkpointed() -> bool:
    """Whether this code runs in a checkpointed segment, which a backward pass computes again."""
    return bool(_segments())


def _segments() -> list[_Segment]:
    """The segments that this code runs in, the innermost first."""
    file, found = _file(), []
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == file and frame.f_code.co_name in _RUNS:
            runner, scope = frame.f_code.co_name, frame.f_locals
            function = scope.get(_RUNS[runner])
            if runner == "backward":
                function = getattr(function, "run_function", None)
            if function is not None:
                found.append(_Segment(function, _first(scope), runner))
        frame = frame.f_back
    return found


@functools.cache
def _file() -> str:
    import torch.utils.checkpoint

    return torch.utils.checkpoint.CheckpointFunction.forward.__code__.co_filename


def _first(scope: dict[str, Any]) -> torch.Tensor | None:
    given = scope.get("detached_inputs", scope.get("args", ()))  # in `backward`, args are the gradients
    values = [*given, *scope.get("kwargs", {}).values()]
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def _outlives_its_calls(function: Any) -> bool:
    """Whether one object may serve many calls; transformers makes a `functools.partial` for each."""
    return isinstance(function, (nn.Module, types.FunctionType))


def _key(segment: _Segment) -> tuple[int, int]:
    x = segment.x if _outlives_its_calls(segment.function) else None
    return id(segment.function), 0 if x is None else x.untyped_storage()._cdata
