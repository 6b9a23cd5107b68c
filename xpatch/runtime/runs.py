"""Low-rank deltas that follow each other at one site and are computed together: a server with a hundred of them, whose batch
uses eight, pays for eight."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from xpatch.patches.types import LowRankDelta

if TYPE_CHECKING:
    from xpatch.runtime.routing import Route
    from xpatch.runtime.snapshot import PreparedPart


class Joined(NamedTuple):
    """The deltas of a run one after another: down `[R, D_in]`, up `[D_out, R]`, offsets `[G + 1]`, as `xpatch.ops.lowrank` takes them."""

    down: torch.Tensor
    up: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True, eq=False)
class DeltaRun:
    """Two or more low-rank deltas without masks and gates at one site."""

    parts: tuple[PreparedPart, ...]
    _joined: dict[tuple[torch.device, torch.dtype], Joined] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device, dtype: torch.dtype) -> Joined:
        """The deltas for this device and dtype; made once. What is handed out is never written to."""
        joined = self._joined.get((device, dtype))
        if joined is None:
            with torch.inference_mode(False), torch.no_grad():
                each = [part.tensors.on(device, dtype) for part in self.parts]
                ends = itertools.accumulate(tensors["down"].shape[0] for tensors in each)
                joined = Joined(
                    torch.cat([tensors["down"] for tensors in each]),
                    torch.cat(
                        [tensors["up"].t() for tensors in each]
                    ).t(),  # stored rank by rank, as the kernel reads it
                    torch.tensor([0, *ends], device=device),
                )
            self._joined[(device, dtype)] = joined
        return joined


# A run outlives the snapshots that share it, so that publishing one set does not join the deltas of all others again.
_runs: weakref.WeakValueDictionary[tuple[int, ...], DeltaRun] = weakref.WeakValueDictionary()


def steps_of(parts: tuple[PreparedPart, ...]) -> tuple[PreparedPart | DeltaRun, ...]:
    """What a site computes, in order: its parts, where deltas that can be computed together are one run."""
    steps: list[PreparedPart | DeltaRun] = []
    for plain, group in itertools.groupby(parts, _is_plain_delta):
        members = tuple(group)
        if plain and len(members) > 1:
            steps.append(_run(members))
        else:
            steps.extend(members)
    return tuple(steps)


def chosen(
    steps: tuple[PreparedPart | DeltaRun, ...], route: Route
) -> Iterator[tuple[PreparedPart | DeltaRun, bool | tuple[bool, ...] | np.ndarray]]:
    """The steps that some row gets, each with who gets it.

    A part: True, or one bool per row. A run: True (every row gets every delta), or a bool array `[G]` (the same for every row) or
    `[B, G]`; where only one delta of a run is used, that part alone.
    """
    for step in steps:
        members = step.parts if isinstance(step, DeltaRun) else (step,)
        keeps = [True if route.keep is None else route.keep.get(part.set_name, False) for part in members]
        used = [index for index, keep in enumerate(keeps) if keep is not False]
        if len(used) == 1:
            yield members[used[0]], keeps[used[0]]
        elif used:
            yield step, True if all(keep is True for keep in keeps) else _selection(keeps)


def _selection(keeps: list[bool | tuple[bool, ...]]) -> np.ndarray:
    batch = next((len(keep) for keep in keeps if isinstance(keep, tuple)), None)
    rows = np.zeros((len(keeps),) if batch is None else (batch, len(keeps)), dtype=bool)
    for index, keep in enumerate(keeps):
        if keep is not False:
            rows[..., index] = keep
    return rows


def _is_plain_delta(part: PreparedPart) -> bool:
    return isinstance(part.part, LowRankDelta) and part.gate is None and part.languages is None


def _run(parts: tuple[PreparedPart, ...]) -> DeltaRun:
    key = tuple(map(id, parts))  # a run holds its parts, so while it lives nothing else has their ids
    run = _runs.get(key)
    if run is None:
        _runs[key] = run = DeltaRun(parts)
        for device, dtype in parts[0].tensors.made():
            run.on(device, dtype)
    return run
