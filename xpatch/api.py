"""The main path: apply, remove, rows, disabled, prepare, optimize, status, save, load."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from xpatch.errors import ConflictError, MismatchError
from xpatch.models.wrappers import unwrapped
from xpatch.patches.expiry import without_expired
from xpatch.patches.identity import check_fit
from xpatch.patches.store import load, save
from xpatch.patches.types import PatchSet
from xpatch.runtime.attach import WRITERS, Runtime, runtime_of
from xpatch.runtime.capacity import Capacity
from xpatch.runtime.compiled import drop_compiled_code, guard_on_hooks, is_compiled, refuse_compiled, refuse_script
from xpatch.runtime.prune import Pruning
from xpatch.runtime.routing import BASE, Rows, rows, switched_off
from xpatch.runtime.snapshot import Snapshot, point_at, prepare_set
from xpatch.runtime.status import Status, status_of
from xpatch.runtime.typical import Sample, typical_rows

if TYPE_CHECKING:
    import torch

    from xpatch.patches.keys import Key

__all__ = ["Rows", "Status", "apply", "disabled", "load", "optimize", "prepare", "remove", "rows", "save", "status"]

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    patches: PatchSet,
    name: str | None = None,
    *,
    tokenizer: Any = None,
    allow: Iterable[str] = (),
    trusted_keys: Iterable[Key] | Key | None = None,
) -> Model:
    """Switch a patch set on, in place; returns the same model. Its weights, classes and state dict stay as they are.

    name: how `remove`, `Rows` and `status` call it; by default the set's own name, else the start of its fingerprint. A set
    applied under a name that exists replaces that one; sets under different names add up. Calls that are running finish with
    what they began with; every later one sees the new state. tokenizer: checked too where given. allow: checks of the base to
    relax, by the names `MismatchError` gives them. trusted_keys: public keys, one of which must have signed the set (`xpatch.verify`).
    Edits that have expired are left out, and a warning names them.

    A model that `torch.compile` compiled before needs `prepare` first; one that is compiled later needs nothing. model may be wrapped
    (`torch.compile`, DataParallel, PEFT): the patches go on the model behind the wrapper.

    Raises `MismatchError` (made for another base, or a site that is not there), `ConflictError` (a compiled model, a reserved
    name), `FormatError` (not signed by a trusted key). Whatever is raised, the model is as it was.
    """
    _check_arguments(model, patches)
    name = _name(patches, name)
    if trusted_keys is not None:
        from xpatch.patches.signing import verify

        verify(patches, trusted_keys)
    current, expired = without_expired(patches)
    if expired:
        listed = ", ".join(map(repr, expired[:5])) + (f" and {len(expired) - 5} more" if expired[5:] else "")
        warnings.warn(f"patch set {name!r}: expired edits are not applied: {listed}", UserWarning, stacklevel=2)
    target = unwrapped(model)
    runtime = runtime_of(target)
    if runtime is None:
        refuse_script(target)
        refuse_compiled(target)
    if patches.base is not None:
        served = [] if runtime is None else [applied.patches for applied in runtime.snapshot.sets.values()]
        check_fit(patches, target, tokenizer=tokenizer, allow=tuple(allow), served=served)
    with WRITERS:
        runtime = runtime_of(target) or Runtime(target)
        applied = prepare_set(target, current, name, lambda: runtime.sites, runtime.typical)
        if expired:
            applied = replace(applied, fingerprint=patches.fingerprint, expired=expired)
        guard_on_hooks()
        runtime.publish(Snapshot.of({**runtime.snapshot.sets, name: applied}, runtime.snapshot.version + 1))
    runtime.settle()
    return model


def remove(model: Model, name: str | None = None) -> Model:
    """Switch the set `name` off, or all sets; returns the same model. After the last one no trace of xpatch is on it, but for what
    `prepare` and `optimize` put there; without a name, `optimize` is undone too, so that the model answers as its base bit for bit.

    Raises `MismatchError` listing the names there are, where none is called `name`.
    """
    with WRITERS:
        target = unwrapped(model)
        runtime = runtime_of(target)
        sets = dict(runtime.snapshot.sets) if runtime is not None else {}
        if name is not None and name not in sets:
            raise MismatchError(
                f"no patch set is called {name!r} on this {type(target).__name__}; applied are {_listed(sets)}"
            )
        if runtime is None:
            return model
        if name is None and runtime.pruning is not None:
            runtime.optimize(None)
        kept = {other: applied for other, applied in sets.items() if name is not None and other != name}
        runtime.publish(Snapshot.of(kept, runtime.snapshot.version + 1))
    runtime.settle()
    return model


def prepare(
    model: Model,
    sites: str | Iterable[str] | None = None,
    *,
    capacity: int | None = None,
    activation: str = "relu",
    sample: Sample | None = None,
    off: bool = False,
) -> Model:
    """Put up the sites where patches will join, before there are any; returns the same model, which answers as before.

    For models under `torch.compile`: a prepared site is part of the compiled code, and applying or removing patches there never
    compiles anything again (patches at other sites do, once). A model that is compiled already drops its code, as does everything
    else compiled in this process, and compiles again on its next call. A prepared model also takes `xpatch=Rows(...)` while no
    patches are applied, so servers can prepare once and pass it always. `prepare(model, off=True)` takes the sites down again.

    sites: names of FFNs or linear layers (`xpatch inspect --model DIR` lists them), or "all" FFNs; by default the final FFN.
    capacity: also make room for so many neurons of `activation` at each of these FFNs, for CUDA graphs captured from the model's
    calls: replays see patches swapped between them. Such a capture cannot hold a row choice, gates, masks or other forms.
    sample: the keyword arguments of a typical call of the model, or a list of them, a few hundred texts in all. The model answers
    them once, and from then on patches at these sites and at those in use are packed for inputs like those: on the CPU thousands
    of neurons are then screened in less time, with the same results. After `optimize`, which changes what reaches the last layer.

    Raises `MismatchError` (a site that is not there; a sample that is none), `ConflictError` (TorchScript; applied patches that do not fit the capacity).
    """
    if not isinstance(model, nn.Module):
        raise MismatchError(f"prepare(model): expected a torch.nn.Module; found {type(model).__name__}")
    target = unwrapped(model)
    with WRITERS:
        runtime = runtime_of(target)
        if off:
            if runtime is not None:
                runtime.capacity = None
                runtime.typical = {}
                runtime.publish(runtime.snapshot, prepared={})
                runtime.settle()
            return model
        refuse_script(target)
        compiled = is_compiled(target) is not None
        runtime = runtime or Runtime(target)
        found = runtime.sites
        if sites is None:
            names = [found[-1].name]
        elif isinstance(sites, str):
            names = [site.name for site in found] if sites == "all" else [sites]
        elif isinstance(sites, Iterable):
            names = list(sites)
        else:
            raise MismatchError(
                f"prepare(sites=...): expected names of FFNs or linear layers, or 'all'; found {sites!r}; "
                "`xpatch inspect --model DIR --linears` lists them"
            )
        points = {name: point_at(target, name, found) for name in names}
        prepared = {name: point for name, (point, _) in points.items()}
        snapshot, typical = runtime.snapshot, runtime.typical
        if sample is not None:
            reached = {**prepared, **snapshot.points}
            typical = {**typical, **typical_rows(target, reached.values(), sample)}
            snapshot = _packed_for(runtime, typical)
        room = None
        if capacity is not None:
            ffns = {site.name for site in found}
            chosen = {name: point for name, (point, _) in points.items() if name in ffns}
            widths = {name: width for name, (_, (width, _)) in points.items()}
            room = Capacity(target, chosen, widths, capacity, activation)
            room.write(snapshot)
        guard_on_hooks()
        runtime.publish(snapshot, prepared=prepared)
        runtime.capacity, runtime.typical = room, typical
        if compiled:
            drop_compiled_code()
            guard_on_hooks()
    return model


def _packed_for(runtime: Runtime, typical: Mapping[str, torch.Tensor]) -> Snapshot:
    """What is applied, its keys packed for the rows `typical` of their sites."""
    model, snapshot = runtime.model, runtime.snapshot
    sets = {
        name: replace(applied, parts=prepare_set(model, applied.patches, name, lambda: runtime.sites, typical).parts)
        for name, applied in snapshot.sets.items()
    }
    return Snapshot.of(sets, snapshot.version + 1)


def optimize(model: Model, *, off: bool = False) -> Model:
    """Compute the last layer for the rows that the head reads alone, in place; returns the same model. Patches there, too, are
    computed for those rows alone. `optimize(model, off=True)` undoes it, and then nothing of it is left.

    Of the last layer queries, the attention's output projection and the FFN are pruned; keys and values are computed for every
    token. Read are: the first token (BERT, XLM-R, RoBERTa, ELECTRA, DistilBERT classifiers), the last token that is not padding
    (classifiers of GPT-2, Llama, Mistral, Qwen, Gemma ...), and in their language models the positions that `logits_to_keep` names,
    as every step of `generate` does. Logits agree with those of the full computation to rounding (1e-5 in fp32), not to the bit.

    Every row is computed where a call asks for hidden states or attentions, in training mode, within `disabled(model)`, and where a
    part such as `model.bert` is called alone. Where every token of an input counts for its firings (classifiers of decoders), only
    those that are computed do. It may come before or after `apply`, and survives the removal of sets by name.

    Raises `MismatchError` (a model whose head or last layer is not known), `ConflictError` (TorchScript).
    """
    if not isinstance(model, nn.Module):
        raise MismatchError(f"optimize(model): expected a torch.nn.Module; found {type(model).__name__}")
    target = unwrapped(model)
    with WRITERS:
        runtime = runtime_of(target)
        if off:
            if runtime is not None and runtime.pruning is not None:
                runtime.optimize(None)
                runtime.settle()
            return model
        refuse_script(target)
        compiled = is_compiled(target) is not None
        runtime = runtime or Runtime(target)
        guard_on_hooks()
        runtime.optimize(Pruning(runtime))
        if compiled:
            drop_compiled_code()
            guard_on_hooks()
    return model


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Within `with disabled(model):` the model answers as its base does, bit for bit; for this thread or task only."""
    return switched_off(unwrapped(model))


def status(model: nn.Module, *, count: bool | None = None) -> Status:
    """What is applied to `model`: names, fingerprints, and per part its site, size, kernel and firings.

    count: True starts the counting of firings (again from zero, on every device), False stops it. Calls on the CPU are counted from
    the first apply on, which costs less than 1 % of a call (`python -m xpatch.benchmarks.firings`).
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
