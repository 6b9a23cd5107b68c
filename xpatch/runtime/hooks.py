"""The objects that sit on a model. They hold nothing but their runtime, so they copy and pickle with the model.

Each can be traced by `torch.compile`: inside a graph it leaves one operator of `xpatch.runtime.graph` behind. Everywhere else it
runs as plain Python, which no compiler may look into.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xpatch.runtime.calls import Slot
from xpatch.runtime.compiled import guard_on_hooks
from xpatch.runtime.graph import KINDS, number_tensor
from xpatch.runtime.routing import batch_of

if TYPE_CHECKING:
    from xpatch.runtime.attach import Runtime
    from xpatch.runtime.calls import Kind

_in_graph = torch.compiler.is_dynamo_compiling


def _not_a_graph_of_its_own(hook: type) -> type:
    """Inside a graph the hook is traced; a compiler that meets it outside of one leaves it and all it calls alone.

    (Where torch offers no such switch, the hook becomes a graph of one operator there, which does the same.)
    """
    frames: Any = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        code = hook.__call__.__code__  # type: ignore[operator]
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    return hook


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a module computes on: its first argument, by position or by keyword."""
    if args:
        return args[0] if isinstance(args[0], torch.Tensor) else None
    for value in kwargs.values():
        if isinstance(value, torch.Tensor):
            return value
    return None


class Hook:
    """What all have in common. Copied with its model, a hook serves the copy; in a copy of a part alone it does nothing, for
    nobody could switch it off there (PEFT copies the modules it trains beside the base's)."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self.runtime.model) not in memo:
            return _nothing
        memo[id(self)] = twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


def _nothing(*ignored: Any) -> None:
    pass


@_not_a_graph_of_its_own
class Enter(Hook):
    """Before the outermost call: take `xpatch=` from its arguments and pin the published snapshot."""

    def __init__(self, runtime: Runtime, kind: Kind) -> None:
        super().__init__(runtime)
        self.kind = kind

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        rows = kwargs.pop(
            "xpatch", None
        )  # a part gets it too where `model.forward(...)` is called past the model's hooks
        batch = batch_of(args, kwargs)
        if _in_graph():
            token = None if rows is None else rows.token
            torch.ops.xpatch.enter(self.runtime.state, KINDS.index(self.kind), -1 if batch is None else batch, token)
        else:
            guard_on_hooks()
            self.runtime.enter(self.kind, rows, batch)
        return args, kwargs

    @property
    def carried(self) -> tuple[str, ...]:
        """The fingerprints of the sets there are (see `models.carried`)."""
        return tuple(applied.fingerprint for applied in self.runtime.snapshot.sets.values())


@_not_a_graph_of_its_own
class Exit(Hook):
    """After the outermost call, also a failed one: let go of the snapshot."""

    def __init__(self, runtime: Runtime, kind: Kind) -> None:
        super().__init__(runtime)
        self.kind = kind

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _in_graph():
            torch.ops.xpatch.leave(self.runtime.state, KINDS.index(self.kind))
        else:
            self.runtime.exit(self.kind)


class Generate(Hook):
    """Stands in for `model.generate`: one call of it sees one snapshot, however many forwards it makes."""

    def __init__(self, runtime: Runtime, before: Any) -> None:
        super().__init__(runtime)
        self.before = before

    @property
    def __wrapped__(self) -> Any:
        model = self.runtime.model
        return self.before if self.before is not None else type(model).generate.__get__(model)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop("xpatch", None)
        outer = self.runtime.enter("generate", rows, batch_of(args, kwargs))
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            self.runtime.exit("generate", outer)


@_not_a_graph_of_its_own
class Keep(Hook):
    """Before an FFN's up projection: remember its input for the patches that join behind its down projection."""

    def __init__(self, runtime: Runtime, site: str, slot: Slot) -> None:
        super().__init__(runtime)
        self.site = site
        self.slot = slot

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if _in_graph():
            self.slot.x = x
        elif x is not None:
            self.runtime.keep(self.site, self.slot, x, module)


@_not_a_graph_of_its_own
class Add(Hook):
    """Behind an FFN's down projection: add its patches."""

    def __init__(self, runtime: Runtime, site: str, slot: Slot) -> None:
        super().__init__(runtime)
        self.site = site
        self.slot = slot
        self.place = number_tensor(runtime.place_of(site))

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if _in_graph():
            x = self.slot.x
            self.slot.x = None
            return None if x is None else _in_the_graph(self, x, output)
        x = self.slot.take()
        return None if x is None else _beside(self, x, output, module)


@_not_a_graph_of_its_own
class Beside(Hook):
    """Beside one module (a linear layer, a whole block of experts): add its patches."""

    def __init__(self, runtime: Runtime, site: str) -> None:
        super().__init__(runtime)
        self.site = site
        self.place = number_tensor(runtime.place_of(site))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = first_tensor(args, kwargs)
        if x is None:
            return None
        return _in_the_graph(self, x, output) if _in_graph() else _beside(self, x, output, module)


def _in_the_graph(hook: Add | Beside, x: torch.Tensor, output: Any) -> Any:
    y = output[0] if isinstance(output, tuple) else output
    out = torch.ops.xpatch.patched(x, y, hook.runtime.state, hook.place, torch.is_grad_enabled())[0]
    return (out, *output[1:]) if isinstance(output, tuple) else out


def _beside(hook: Add | Beside, x: torch.Tensor, output: Any, module: nn.Module) -> Any:
    """The output with its patches, or None (as it is). Of several outputs the first is the hidden state."""
    y = output[0] if isinstance(output, tuple) else output
    out = hook.runtime.add(hook.site, x, y, hook.runtime.call(module))
    return (out, *output[1:]) if isinstance(output, tuple) and out is not None else out
