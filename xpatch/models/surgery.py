"""Hooks that undo themselves: the only way xpatch touches a model. Weights, classes and the state dict stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Surgery:
    """Hooks and instance attributes put on a model, undone together in reverse order. Also a context manager.

    Copies and pickles with the model it belongs to: a copy's surgery undoes the copy's hooks.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._attributes: list[tuple[nn.Module, str, tuple[Any, ...]]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False, kwargs: bool = False) -> None:
        """Call `hook(module, args[, kwargs])` before `module` computes."""
        self._handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=kwargs))

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False, kwargs: bool = False) -> None:
        """Call `hook(module, args[, kwargs], output)` after `module` computed; with `always`, also when it failed."""
        self._handles.append(module.register_forward_hook(hook, always_call=always, with_kwargs=kwargs))

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Shadow a method of `module`'s class by an attribute of this one object."""
        before = (vars(module)[name],) if name in vars(module) else ()
        vars(module)[name] = value
        self._attributes.append((module, name, before))

    def undo(self) -> None:
        """Take everything off again. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._attributes:
            module, name, before = self._attributes.pop()
            vars(module).pop(name, None)
            if before:
                vars(module)[name] = before[0]

    def __enter__(self) -> Surgery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
