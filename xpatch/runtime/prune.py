"""The last layer for the rows the head reads alone: hooks that cut the inputs of its row-wise modules and spread their outputs.

Around each segment of the layer (`xpatch.models.readers`) one hook hands on the read rows `[B, R, D]` and one puts the result back
into `[B, T, D]`. Whatever else the layer, the model and its head do sees tensors of the usual shape, and attention itself runs as
ever, so masks, positions, caches and kernels need no second implementation here; what is left undone is its two products for the
other queries, T / 6 D of the layer. A segment that meets another shape than it expects computes every row.

Which rows a call reads is decided when the model itself is called. A part called alone finds no decision and computes every row.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xpatch.models.readers import Kept, Reader, Segment, is_every_row_asked_for, reader_of
from xpatch.models.surgery import Surgery
from xpatch.ops import in_torch_func
from xpatch.runtime.hooks import Hook, _in_graph, _not_a_graph_of_its_own
from xpatch.runtime.recompute import is_checkpointed
from xpatch.runtime.routing import is_switched_off

if TYPE_CHECKING:
    from xpatch.runtime.attach import Runtime


class Here(threading.local):
    """What this thread's call of the model reads; None outside of one and where it needs every row."""

    def __init__(self) -> None:
        self.kept: Kept | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Here, ()


class _Pruning(Hook):
    def __init__(self, runtime: Runtime, here: Here) -> None:
        super().__init__(runtime)
        self.here = here


@_not_a_graph_of_its_own
class Read(_Pruning):
    """Before the model computes: which rows it needs."""

    def __init__(self, runtime: Runtime, here: Here, reader: Reader) -> None:
        super().__init__(runtime, here)
        self.reader = reader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self.here.kept = None
        elif _in_graph() or self._is_plain_call():
            self.here.kept = self.reader.kept(module, args, kwargs)
        else:
            self.here.kept = None

    def _is_plain_call(self) -> bool:
        if is_switched_off(self.runtime.model) or is_every_row_asked_for():
            return False
        return not (torch.jit.is_tracing() or torch.compiler.is_compiling() or in_torch_func())


@_not_a_graph_of_its_own
class Done(_Pruning):
    """After the model computed, also where it failed."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.here.kept = None


@_not_a_graph_of_its_own
class Narrow(_Pruning):
    """Before a segment: its inputs, cut to the read rows."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        kept = self.here.kept
        if kept is None or module.training:
            return None
        # What is computed again in a backward pass, outside of the model's call, must be what was computed first.
        if not _in_graph() and torch.is_grad_enabled() and is_checkpointed():
            return None
        narrowed = tuple([kept.narrow(x) if kept.fits(x) else x for x in args])
        return narrowed, {name: kept.narrow(x) if kept.fits(x) else x for name, x in kwargs.items()}


@_not_a_graph_of_its_own
class Widen(_Pruning):
    """After a segment: its rows in their places."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        kept = self.here.kept
        if kept is None:
            return None
        if isinstance(output, tuple):
            return (kept.widen(output[0]), *output[1:]) if output and kept.is_narrow(output[0]) else None
        return kept.widen(output) if kept.is_narrow(output) else None


class Pruning:
    """The hooks of one optimised model. Raises `MismatchError`, changing nothing, for a model whose reader is not known."""

    def __init__(self, runtime: Runtime) -> None:
        model = runtime.model
        self.model = model
        self.reader = reader_of(model)
        self.here = Here()
        self._surgery = Surgery()
        self._surgery.after(model, Done(runtime, self.here), always=True)
        for segment in self.reader.segments:
            self._install(runtime, segment)
        self._surgery.before(model, Read(runtime, self.here, self.reader), kwargs=True)

    def _install(self, runtime: Runtime, segment: Segment) -> None:
        self._surgery.after(self.model.get_submodule(segment.widen), Widen(runtime, self.here))
        self._surgery.before(self.model.get_submodule(segment.narrow), Narrow(runtime, self.here), kwargs=True)

    def step_back(self) -> None:
        """Let outputs be spread after all other hooks have seen them: a patch beside a linear layer adds to the rows it was given."""
        for segment in self.reader.segments:
            hooks: Any = self.model.get_submodule(segment.widen)._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, Widen)]:
                hooks.move_to_end(key)

    def undo(self) -> None:
        """Take the hooks off, also those that a module which took another's place got a copy of."""
        self._surgery.undo()
        for module in self.model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [
                    key for key, hook in hooks.items() if isinstance(hook, _Pruning) and hook.here is self.here
                ]:
                    hooks.pop(key)
