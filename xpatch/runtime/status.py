"""What is attached to a model, as values that print as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from xpatch.ops.native import backend_for
from xpatch.patches.types import PatchNeurons
from xpatch.runtime.attach import WRITERS, Runtime, runtime_of
from xpatch.runtime.columns import columns
from xpatch.runtime.firings import Firings, countable, first_token_sites
from xpatch.runtime.snapshot import AppliedSet, PreparedPart, compute_dtype


@dataclass(frozen=True)
class PartStatus:
    """One part at work. count: neurons, ranks, or 0 for a dense delta. bytes: its tensors in fp32. kernel: "native" or
    "reference". fired: (input, neuron) pairs since counting began, for a gated delta the inputs its gate opened for (see
    `xpatch.firings`); None while nothing is counted and for a delta without a gate, which acts on every input."""

    set_name: str
    part: str
    site: str
    form: str
    count: int
    bytes: int
    kernel: str
    fired: int | None


@dataclass(frozen=True)
class SetStatus:
    """One applied set. edits: entries of its ledger that are in force. expired: the ids of those past their time, left out."""

    name: str
    fingerprint: str
    edits: int
    expired: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteStatus:
    """The parts of all sets at one site: how many, their neurons and ranks, bytes in fp32, and firings (None: not counted)."""

    site: str
    parts: int
    count: int
    bytes: int
    fired: int | None


@dataclass(frozen=True)
class Status:
    """Everything xpatch has on one model; empty where nothing is applied.

    optimized: which rows an optimised model computes in its last layer: "first" or "last" (token), "kept" (those whose logits a call
    keeps); None where it computes all (see `xpatch.optimize`).
    """

    sets: tuple[SetStatus, ...] = ()
    parts: tuple[PartStatus, ...] = ()
    optimized: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.sets)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.site for item in self.parts))

    @property
    def per_site(self) -> tuple[SiteStatus, ...]:
        """The parts added up per site, in the order of `sites`."""
        return tuple(_site(name, [part for part in self.parts if part.site == name]) for name in self.sites)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {**dataclasses.asdict(self), "sites": [dataclasses.asdict(site) for site in self.per_site]}

    def __str__(self) -> str:
        rows = {"kept": "the rows whose logits are kept"}.get(self.optimized or "", f"the {self.optimized} token")
        optimized = [f"optimised: the last layer computes {rows} alone"] if self.optimized else []
        if not self.sets:
            return "\n".join(["no patches applied", *optimized])
        lines = [
            f"{item.name}  {item.edits} edits{_left_out(item.expired)}  {item.fingerprint[:12]}" for item in self.sets
        ]
        head = ("set", "part", "site", "form", "count", "bytes", "kernel", "fired")
        return "\n".join([*lines, *optimized, columns(head, [dataclasses.astuple(part) for part in self.parts])])


def status_of(model: nn.Module, count: bool | None) -> Status:
    """See `xpatch.status`."""
    runtime = runtime_of(model)
    if runtime is None:
        return Status()
    if count is not None:
        with WRITERS:
            runtime.firings = Firings(first_token=first_token_sites(runtime.model)) if count else None
    snapshot, firings = runtime.snapshot, runtime.firings
    parts = [part for applied in snapshot.sets.values() for part in applied.parts]
    return Status(
        sets=tuple(_set(applied) for applied in snapshot.sets.values()),
        parts=tuple(_part(runtime, part, firings) for part in parts),
        optimized=None if runtime.pruning is None else runtime.pruning.reader.reads,
    )


def _set(applied: AppliedSet) -> SetStatus:
    return SetStatus(applied.name, applied.fingerprint, len(applied.patches), applied.expired)


def _left_out(expired: tuple[str, ...]) -> str:
    if not expired:
        return ""
    more = f" and {len(expired) - 3} more" if expired[3:] else ""
    return f" ({len(expired)} expired: {', '.join(expired[:3])}{more})"


def _part(runtime: Runtime, part: PreparedPart, firings: Firings | None) -> PartStatus:
    return PartStatus(
        set_name=part.set_name,
        part=part.name,
        site=part.point.site,
        form=part.part.form,
        count=part.part.count,
        bytes=part.part.nbytes,
        kernel=_kernel(runtime.model, part) if isinstance(part.part, PatchNeurons) else "reference",
        fired=firings.total(part) if firings is not None and countable(part) else None,
    )


def _site(name: str, parts: list[PartStatus]) -> SiteStatus:
    counted = [part.fired for part in parts if part.fired is not None]
    return SiteStatus(
        site=name,
        parts=len(parts),
        count=sum(part.count for part in parts),
        bytes=sum(part.bytes for part in parts),
        fired=sum(counted) if counted else None,
    )


def _kernel(model: nn.Module, part: PreparedPart) -> str:
    weight = next(model.get_submodule(part.point.adds).parameters(), None)
    return "reference" if weight is None else backend_for(weight.device.type, compute_dtype(weight.dtype))
