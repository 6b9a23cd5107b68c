"""What the patches at one site add to its output."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from xpatch.ops import ball, dense, in_torch_func, lowrank, mask, patch_ffn, patch_ffn_fired
from xpatch.patches.types import DenseDelta, Gate, LowRankDelta, PatchNeurons
from xpatch.runtime.firings import Firings
from xpatch.runtime.routing import Route, spread
from xpatch.runtime.runs import DeltaRun, chosen
from xpatch.runtime.snapshot import PreparedPart, compute_dtype


def add_patches(
    steps: tuple[PreparedPart | DeltaRun, ...],
    x: torch.Tensor,
    y: torch.Tensor,
    route: Route,
    firings: Firings | None = None,
) -> torch.Tensor:
    """`y + Σ patch(x)` over the parts each row gets: x `[..., D_in]`, y `[..., D_out]` -> as y, with y's dtype and device.

    steps: the parts, where deltas that go together may be one run. The sum is formed in `compute_dtype(y.dtype)` and rounded once to y's dtype; a row that gets no part keeps its bits.
    `firings`, where given, hears which neurons fired; the result is the same. Differentiable.
    """
    dtype = compute_dtype(y.dtype)
    if firings is not None and (not firings.counts_on(y.device) or in_torch_func() or torch.compiler.is_compiling()):
        firings = None  # there are no values to count within a trace or a transform
    with _no_autocast(y.device):
        x = x.to(device=y.device, dtype=dtype)
        total: torch.Tensor | None = None
        touched: torch.Tensor | bool = False
        for step, keep in chosen(steps, route):
            if isinstance(step, DeltaRun):
                delta, here = _together(step, x, y, keep)
            else:
                here = None if keep is True else _column(torch.tensor(keep, device=y.device), y)
                delta = _delta(step, x, route, here, firings)
                delta = delta if here is None else torch.where(here, delta, 0)
            if here is not None:
                touched = touched if touched is True else here if touched is False else touched | here
            else:
                touched = True
            total = delta if total is None else total + delta
        if total is None:
            return y
        patched = (y.to(dtype) + total).to(y.dtype)
    return patched if touched is True else torch.where(touched, patched, y)  # type: ignore[arg-type]


def _delta(
    part: PreparedPart, x: torch.Tensor, route: Route, here: torch.Tensor | None, firings: Firings | None
) -> torch.Tensor:
    """One part's own `[..., D_out]`: masked, computed, masked, gated (on the part's unmasked input)."""
    tensors = part.tensors.on(x.device, x.dtype)
    language = _language(part, x, route)
    if isinstance(part.part, PatchNeurons):
        delta, fired = _neurons(part, tensors, x, language, firings is not None)
    else:
        delta, fired = _linear(part.part, tensors, _entering(tensors, x, language)), None
        if language is not None:
            delta = mask(delta, tensors["mask_outer"], language)
    opened = None if part.gate is None else _opened(part.gate, x, delta, tensors)
    if firings is not None and (fired is not None or opened is not None):
        count = tensors["keys"].shape[0] if fired is not None else 1
        firings.record(part, _acting(fired, x.shape[:-1], opened, here), x.shape[:-1], count, route)
    return delta if opened is None else torch.where(opened, delta, 0)


def _together(
    run: DeltaRun, x: torch.Tensor, y: torch.Tensor, keep: bool | tuple[bool, ...] | np.ndarray
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the deltas of a run add `[..., D_out]`, exactly 0 for a row that gets none; and which rows get some, None for all."""
    joined = run.on(x.device, x.dtype)
    if keep is True:
        return lowrank(x, joined.down, joined.up), None
    rows = torch.tensor(keep, device=x.device)
    here = None if np.all(np.any(keep, axis=-1)) else _column(rows.any(-1), y)
    return lowrank(x, joined.down, joined.up, joined.offsets, rows if rows.ndim == 1 else spread(rows, x)), here


def _neurons(
    part: PreparedPart, tensors: dict[str, torch.Tensor], x: torch.Tensor, language: torch.Tensor | None, count: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the neurons add, masks included, and the (row, neuron) pairs that fired where they are to be counted."""
    if language is None:
        bound = part.tensors.neurons(x.device, x.dtype)
        return bound.fired(x) if count else (bound(x), None)
    masks = (tensors["mask_inner"], tensors["mask_outer"], language)
    activation = part.part.activation  # type: ignore[union-attr]
    neurons = (tensors["keys"], tensors["bias"], tensors["values"], activation, tensors.get("packed"))
    return patch_ffn_fired(x, *neurons, *masks) if count else (patch_ffn(x, *neurons, *masks), None)


def _linear(part: LowRankDelta | DenseDelta, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, LowRankDelta):
        return lowrank(x, tensors["down"], tensors["up"])
    return dense(x, tensors["weight"], tensors.get("bias"))


def scores(part: PreparedPart, x: torch.Tensor, route: Route) -> torch.Tensor:
    """`x·key + bias` of every neuron of a part, as `add_patches` computes it: x `[..., D]` -> `[..., N]`."""
    tensors = part.tensors.on(x.device, compute_dtype(x.dtype))
    x = x.to(compute_dtype(x.dtype))
    return torch.nn.functional.linear(
        _entering(tensors, x, _language(part, x, route)), tensors["keys"], tensors["bias"]
    )


def _entering(tensors: dict[str, torch.Tensor], x: torch.Tensor, language: torch.Tensor | None) -> torch.Tensor:
    return x if language is None else mask(x, tensors["mask_inner"], language)


@torch.no_grad()
def _opened(gate: Gate, x: torch.Tensor, delta: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the gate lets the part act: `[..., 1]` bool."""
    if gate.kind == "ball":
        return ball(x, tensors["gate_keys"], tensors["gate_radii"], tensors.get("gate_packed")).unsqueeze(-1)
    return torch.linalg.vector_norm(delta, dim=-1, keepdim=True) >= (gate.threshold or 0.0)


def _acting(
    fired: torch.Tensor | None, lead: torch.Size, opened: torch.Tensor | None, here: torch.Tensor | None
) -> torch.Tensor:
    """`[K, 2]` int64 (row, neuron): what fired on rows that get the part and that its gate lets through.

    fired: `[K, 2]`, or None for a delta, which acts as one neuron where its gate is open. lead: x's leading axes.
    """
    given = [condition.expand(*lead, 1).reshape(-1) for condition in (opened, here) if condition is not None]
    if fired is None:
        rows = torch.stack(given).all(0).nonzero()
        return torch.cat((rows, torch.zeros_like(rows)), dim=1)
    for condition in given:
        fired = fired[condition[fired[:, 0]]]
    return fired


def _language(part: PreparedPart, x: torch.Tensor, route: Route) -> torch.Tensor | None:
    """Row of the mask's tables for each leading row of x, or one for all; None where no mask applies."""
    if part.languages is None or route.languages is None:
        return None
    known: dict[str | None, int] = {language: index for index, language in enumerate(part.languages)}
    if isinstance(route.languages, str):
        return torch.tensor(known.get(route.languages, len(known)), device=x.device)
    return spread(torch.tensor([known.get(name, len(known)) for name in route.languages], device=x.device), x)


def _column(values: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    values = spread(values, y)
    return values.reshape(-1, *([1] * (y.ndim - 1)))


def _no_autocast(device: torch.device) -> AbstractContextManager[None]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
