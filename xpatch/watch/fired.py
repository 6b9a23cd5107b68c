"""`firings`: the counts of a served model, by edit and language."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from xpatch.patches.types import PatchNeurons
from xpatch.runtime.attach import runtime_of
from xpatch.runtime.columns import columns
from xpatch.runtime.firings import UNKNOWN, Counts, countable
from xpatch.runtime.snapshot import AppliedSet, PreparedPart
from xpatch.watch.units import WHOLE, Unit, listed, units_of

SHOWN = 40


@dataclass(frozen=True)
class EditFirings:
    """How often one edit fired. edits: usually one id; several that cannot be separated; none for rows no edit owns.

    neurons: how many of the part's neurons (or ranks) are theirs, 0 for a dense delta. fired: (input, neuron) pairs; for a gated delta
    the inputs its gate opened for. languages: the same by the language of the input, "?" where the call named none.
    """

    set_name: str
    edits: tuple[str, ...]
    part: str
    neurons: int
    fired: int
    languages: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FiringReport:
    """The counts of one model since `since` (ISO 8601, UTC); empty where nothing is counted (`counting` is False).

    entries: one line per edit and part, also for edits that never fired, in the order of the sets and their ledgers. always: (set,
    part) of deltas without a gate, which act on every input and are not counted.
    """

    counting: bool
    since: str | None = None
    entries: tuple[EditFirings, ...] = ()
    always: tuple[tuple[str, str], ...] = ()

    @property
    def fired(self) -> tuple[EditFirings, ...]:
        """The entries that fired, most often first."""
        return tuple(sorted((entry for entry in self.entries if entry.fired), key=lambda entry: -entry.fired))

    @property
    def silent(self) -> tuple[EditFirings, ...]:
        """The entries that never fired."""
        return tuple(entry for entry in self.entries if not entry.fired)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "counting": self.counting,
            "since": self.since,
            "entries": [
                {**dataclasses.asdict(entry), "edits": list(entry.edits), "languages": dict(entry.languages)}
                for entry in self.entries
            ],
            "always": [list(pair) for pair in self.always],
        }

    def __str__(self) -> str:
        if not self.counting:
            return "firings are not counted; xpatch.status(model, count=True) starts counting"
        lines = [f"counted since {self.since}"]
        if self.fired:
            rows = [
                (
                    entry.set_name,
                    listed(entry.edits),
                    entry.part,
                    entry.fired,
                    ", ".join(f"{language} {count}" for language, count in entry.languages.items() if count),
                )
                for entry in self.fired[:SHOWN]
            ]
            lines.append(columns(("set", "edit", "part", "fired", "languages"), rows))
        if len(self.fired) > SHOWN:
            lines.append(f"{len(self.fired) - SHOWN} more fired; to_dict() holds all")
        if self.silent:
            lines.append(f"{len(self.silent)} of {len(self.entries)} never fired")
        lines += [f"{name}: part {part!r} acts on every input" for name, part in self.always]
        return "\n".join(lines)


def firings(model: nn.Module, *, reset: bool = False) -> FiringReport:
    """Which edits fired while `model` served, how often, and in which language. `reset` starts again from zero at that moment.

    An edit fired on an input (a row of a call's batch) where the score `x·key + bias` of one of its neurons was above zero at a token,
    for GELU and SiLU as for ReLU, and the part's gate, if it has one, was open. At the final FFN of a classifier that reads its first
    token only that token counts; elsewhere every token does, padding too. An edit with two neurons may count an input twice.

    Counts are kept for the sets applied now; a set that is applied again begins at zero. Calls on the CPU are counted unless
    `xpatch.status(model, count=False)` stopped it; `count=True` begins again and counts on every device.
    """
    runtime = runtime_of(model)
    counts = None if runtime is None else runtime.firings
    if runtime is None or counts is None:
        return FiringReport(counting=False)
    sets = list(runtime.snapshot.sets.values())
    parts = [part for applied in sets for part in applied.parts if countable(part)]
    since = counts.since
    taken = dict(zip(parts, counts.take(parts, reset=reset), strict=True))
    return FiringReport(
        counting=True,
        since=since,
        entries=tuple(entry for applied in sets for entry in _entries(applied, taken)),
        always=tuple((a.name, part.name) for a in sets for part in a.parts if not countable(part)),
    )


def _entries(applied: AppliedSet, taken: Mapping[PreparedPart, Counts]) -> list[EditFirings]:
    by_name = {part.name: part for part in applied.parts if part in taken}
    return [
        _entry(applied.name, unit, by_name[name], taken[by_name[name]])
        for unit in units_of(applied.name, applied.patches)
        for name in unit.rows
        if name in by_name
    ]


def _entry(set_name: str, unit: Unit, part: PreparedPart, counts: Counts) -> EditFirings:
    owned = unit.rows[part.name]
    neurons = part.part.count if owned is WHOLE else len(owned)
    which: Any = slice(None) if owned is WHOLE or not isinstance(part.part, PatchNeurons) else np.array(owned)
    languages = {language: int(row[which].sum()) for language, row in sorted(counts.items()) if language != UNKNOWN}
    if UNKNOWN in counts:
        languages[UNKNOWN] = int(counts[UNKNOWN][which].sum())
    return EditFirings(
        set_name=set_name,
        edits=unit.edits,
        part=part.name,
        neurons=neurons,
        fired=sum(languages.values()),
        languages={language: count for language, count in languages.items() if count},
    )
