"""The main path: apply, remove, rows, disabled, status, save, load."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn

from xpatch.errors import ConflictError, MismatchError
from xpatch.patches.identity import check_fit
from xpatch.patches.store import load, save
from xpatch.patches.types import PatchSet
from xpatch.runtime.attach import WRITERS, Runtime, runtime_of
from xpatch.runtime.compiled import refuse_compiled
from xpatch.runtime.routing import BASE, Rows, rows, switched_off
from xpatch.runtime.snapshot import Snapshot, prepare
from xpatch.runtime.status import Status, status_of

__all__ = ["Rows", "Status", "apply", "disabled", "load", "remove", "rows", "save", "status"]

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model, patches: PatchSet, name: str | None = None, *, tokenizer: Any = None, allow: Iterable[str] = ()
) -> Model:
    """Switch a patch set on, in place; returns the same model. Its weights, classes and state dict stay as they are.

    name: how `remove`, `Rows` and `status` call it; by default the set's own name, else the start of its fingerprint. A set
    applied under a name that exists replaces that one; sets under different names add up. Calls that are running finish with
    what they began with; every later one sees the new state. tokenizer: checked too where given. allow: checks of the base to
    relax, by the names `MismatchError` gives them.

    Raises `MismatchError` (made for another base, or a site that is not there), `ConflictError` (a compiled model, a reserved
    name). Whatever is raised, the model is as it was.
    """
    _check_arguments(model, patches)
    refuse_compiled(model, look_for_wrapper=runtime_of(model) is None)  # what is patched refuses to run compiled anyway
    if patches.base is not None:
        check_fit(patches, model, tokenizer=tokenizer, allow=tuple(allow))
    name = _name(patches, name)
    applied = prepare(model, patches, name)
    with WRITERS:
        runtime = runtime_of(model) or Runtime(model)
        sets = {**runtime.snapshot.sets, name: applied}
        runtime.publish(Snapshot.of(sets, runtime.snapshot.version + 1))
    runtime.settle()
    return model


def remove(model: Model, name: str | None = None) -> Model:
    """Switch the set `name` off, or all sets; returns the same model. After the last one no trace of xpatch is on it.

    Raises `MismatchError` listing the names there are, where none is called `name`.
    """
    with WRITERS:
        runtime = runtime_of(model)
        sets = dict(runtime.snapshot.sets) if runtime is not None else {}
        if name is not None and name not in sets:
            raise MismatchError(
                f"no patch set is called {name!r} on this {type(model).__name__}; applied are {_listed(sets)}"
            )
        if runtime is None:
            return model
        kept = {other: applied for other, applied in sets.items() if name is not None and other != name}
        runtime.publish(Snapshot.of(kept, runtime.snapshot.version + 1))
    runtime.settle()
    return model


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Within `with disabled(model):` the model answers as its base does, bit for bit; for this thread or task only."""
    return switched_off(model)


def status(model: nn.Module, *, count: bool | None = None) -> Status:
    """What is applied to `model`: names, fingerprints, and per part its site, size, kernel and firings.

    count: True starts (again from zero) and False stops the counting of firings, which costs one more product with the keys.
    """
    return status_of(model, count)


def _check_arguments(model: object, patches: object) -> None:
    if not isinstance(model, nn.Module):
        raise MismatchError(f"apply(model, patches): expected a torch.nn.Module as model; found {type(model).__name__}")
    if not isinstance(patches, PatchSet):
        raise MismatchError(
            f"apply(model, patches): expected a PatchSet; found {type(patches).__name__}. Load a folder with xpatch.load(folder)"
        )


def _name(patches: PatchSet, name: str | None) -> str:
    name = name if name is not None else patches.name or patches.fingerprint[:12]
    if not isinstance(name, str) or not name:
        raise MismatchError(f"apply(name=...): expected a non-empty string; found {name!r}")
    if name == BASE:
        raise ConflictError(f"a patch set cannot be called {BASE!r}: Rows(patches=...) means the unpatched model by it")
    return name


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
