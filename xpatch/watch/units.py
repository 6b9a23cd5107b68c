"""What can be switched off on its own: an edit with its rows, or several edits that cannot be separated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xpatch.patches.compose import Ownership, part_ownership
from xpatch.patches.ledger import owners
from xpatch.patches.types import PatchSet

WHOLE = None
"""In `Unit.rows`: the whole part."""


@dataclass(frozen=True)
class Unit:
    """Edits of one set that act together, with all they own.

    edits: usually one id; several where edits share a group or a part; none for rows and parts that no edit owns.
    rows: part name -> its rows (neurons or ranks), or `WHOLE`.
    """

    set_name: str
    edits: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...] | None]

    @property
    def label(self) -> str:
        """How tables call it: the set and the edit."""
        return f"{self.set_name}/{listed(self.edits)}"


def listed(edits: Sequence[str]) -> str:
    """The ids of a unit's edits in few words."""
    more = f" and {len(edits) - 1} more" if len(edits) > 1 else ""
    return f"{edits[0]}{more}" if edits else "(no edit)"


def units_of(name: str, patches: PatchSet) -> list[Unit]:
    """Every unit of a set applied as `name`, in the order of its ledger; what no edit owns comes last.

    Edits that own nothing (right already, failed) are no units: there is nothing to switch off.
    """
    ownership, owner = part_ownership(patches), owners(patches)
    bundle = _bundles(patches, ownership)
    edits: dict[str, list[str]] = {}
    rows: dict[str, dict[str, tuple[int, ...] | None]] = {}
    for record in patches.edits:
        for part, owned in record.rows.items():
            mine = rows.setdefault(bundle[record.id], {})
            if ownership[part] == "shared":
                mine[part] = WHOLE
            elif owned:
                mine[part] = (*(mine.get(part) or ()), *owned)
        if rows.get(bundle[record.id]):
            edits.setdefault(bundle[record.id], []).append(record.id)
    units = [Unit(name, tuple(ids), rows[key]) for key, ids in edits.items()]
    whole = {part for unit in units for part, owned in unit.rows.items() if owned is WHOLE}
    nobodys: dict[str, tuple[int, ...] | None] = {}
    for part, value in patches.parts.items():
        free = tuple(row for row, edit in enumerate(owner[part]) if edit is None)
        if part not in whole and (free or value.form == "dense"):
            nobodys[part] = free or WHOLE
    return [*units, Unit(name, (), nobodys)] if nobodys else units


def _bundles(patches: PatchSet, ownership: Mapping[str, Ownership]) -> dict[str, str]:
    """Edit id -> the first edit of those it cannot be separated from: by its group, or by a part they share as a whole."""
    parent = {record.id: record.id for record in patches.edits}

    def root(id: str) -> str:
        while parent[id] != id:
            id = parent[id]
        return id

    first: dict[tuple[str, str], str] = {}
    for record in patches.edits:
        bonds = [("part", part) for part in record.rows if ownership[part] == "shared"]
        bonds += [("group", record.group)] if record.group else []
        for bond in bonds:
            parent[root(record.id)] = root(first.setdefault(bond, record.id))
    return {id: root(id) for id in parent}
