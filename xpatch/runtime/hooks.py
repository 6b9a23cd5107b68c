"""The objects that sit on a model. They hold nothing but their runtime, so they copy and pickle with the model.

A patched model refuses to run compiled: `torch.compile` shares code between a model's layers without looking at their hooks, so
a patch at one layer can be left out without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xpatch.runtime.compiled import refuse_compiler

if TYPE_CHECKING:
    from xpatch.runtime.attach import Kind, Runtime

_outside_graphs = torch.compiler.disable
#: What evaluates this thread's frames: None, or a callable where a compiler does.
_compiler = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)


class Enter:
    """Before the outermost call: take `xpatch=` from its arguments and pin the published snapshot."""

    def __init__(self, runtime: Runtime, kind: Kind) -> None:
        self.runtime = runtime
        self.kind = kind

    @torch.compiler.disable(recursive=False)  # not traced, yet run where an active compiler can be seen
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self.runtime.snapshot.sets and callable(_compiler()):
            refuse_compiler(module)
        rows = kwargs.pop("xpatch", None) if self.kind == "forward" else None
        self.runtime.enter(self.kind, rows, args, kwargs)
        return args, kwargs


class Exit:
    """After the outermost call, also a failed one: let go of the snapshot."""

    def __init__(self, runtime: Runtime, kind: Kind) -> None:
        self.runtime = runtime
        self.kind = kind

    @_outside_graphs
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.runtime.exit(self.kind)


class Generate:
    """Stands in for `model.generate`: one call of it sees one snapshot, however many forwards it makes."""

    def __init__(self, runtime: Runtime, before: Any) -> None:
        self.runtime = runtime
        self.before = before

    @property
    def __wrapped__(self) -> Any:
        model = self.runtime.model
        return self.before if self.before is not None else type(model).generate.__get__(model)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop("xpatch", None)
        outer = self.runtime.enter("generate", rows, args, kwargs)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            self.runtime.exit("generate", outer)


class Keep:
    """Before an FFN's up projection: remember its input for the patches that join behind its down projection."""

    def __init__(self, runtime: Runtime, site: str) -> None:
        self.runtime = runtime
        self.site = site

    @_outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self.runtime.keep(self.site, args[0])


class Add:
    """Behind an FFN's down projection: add its patches."""

    def __init__(self, runtime: Runtime, site: str) -> None:
        self.runtime = runtime
        self.site = site

    @_outside_graphs
    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return self.runtime.add(self.site, None, output)


class Beside:
    """Beside one linear layer: add its deltas."""

    def __init__(self, runtime: Runtime, site: str) -> None:
        self.runtime = runtime
        self.site = site

    @_outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return self.runtime.add(self.site, args[0], output) if args else None
