"""What is attached to a model, as values that print as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from xpatch.ops.native import backend_for
from xpatch.patches.types import PatchNeurons
from xpatch.runtime.attach import WRITERS, Runtime, runtime_of
from xpatch.runtime.firings import Firings
from xpatch.runtime.snapshot import PreparedPart, compute_dtype


@dataclass(frozen=True)
class PartStatus:
    """One part at work. count: neurons, ranks, or 0 for a dense delta. bytes: its tensors in fp32. kernel: "native" or
    "reference". fired: (row, neuron) pairs above zero since counting began, None while nothing is counted."""

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
    """One applied set. edits: entries of its ledger."""

    name: str
    fingerprint: str
    edits: int


@dataclass(frozen=True)
class Status:
    """Everything xpatch has on one model; empty where nothing is applied."""

    sets: tuple[SetStatus, ...] = ()
    parts: tuple[PartStatus, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.sets)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.site for item in self.parts))

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.parts)

    def __str__(self) -> str:
        if not self.sets:
            return "no patches applied"
        lines = [f"{item.name}  {item.edits} edits  {item.fingerprint[:12]}" for item in self.sets]
        head = ("set", "part", "site", "form", "count", "bytes", "kernel", "fired")
        rows = [
            (
                p.set_name,
                p.part,
                p.site,
                p.form,
                str(p.count),
                str(p.bytes),
                p.kernel,
                "-" if p.fired is None else str(p.fired),
            )
            for p in self.parts
        ]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        ]
        return "\n".join(lines)


def status_of(model: nn.Module, count: bool | None) -> Status:
    """See `xpatch.status`."""
    runtime = runtime_of(model)
    if runtime is None:
        return Status()
    if count is not None:
        with WRITERS:
            runtime.firings = Firings() if count else None
    snapshot, firings = runtime.snapshot, runtime.firings
    parts = [part for applied in snapshot.sets.values() for part in applied.parts]
    return Status(
        sets=tuple(SetStatus(item.name, item.fingerprint, len(item.patches)) for item in snapshot.sets.values()),
        parts=tuple(_part(runtime, part, firings) for part in parts),
    )


def _part(runtime: Runtime, part: PreparedPart, firings: Firings | None) -> PartStatus:
    neurons = isinstance(part.part, PatchNeurons)
    return PartStatus(
        set_name=part.set_name,
        part=part.name,
        site=part.point.site,
        form=part.part.form,
        count=part.part.count,
        bytes=part.part.nbytes,
        kernel=_kernel(runtime.model, part) if neurons else "reference",
        fired=firings.total(part) if firings is not None and neurons else None,
    )


def _kernel(model: nn.Module, part: PreparedPart) -> str:
    weight = next(model.get_submodule(part.point.adds).parameters(), None)
    return "reference" if weight is None else backend_for(weight.device.type, compute_dtype(weight.dtype))
