"""What binds a patch set together: its parts' references, and which edit owns which rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xpatch.errors import FormatError, MismatchError
from xpatch.patches import checks
from xpatch.patches.forms import Gate, LanguageMask, Part
from xpatch.patches.identity import BaseIdentity
from xpatch.patches.requests import EditRequest, Version

if TYPE_CHECKING:
    from xpatch.patches.types import EditRecord, PatchSet

SHARED_FIELDS = ("author", "reason", "expires", "target", "old_target")
VERSION_FIELDS = ("subject", "rephrases", "locality", "portability")


def check_set(patches: PatchSet) -> None:
    """Everything a set promises. Raises `FormatError` naming the part, mask, gate or edit."""
    from xpatch.patches.types import EditRecord

    _check_kinds(patches.parts, Part, "part")
    _check_kinds(patches.masks, LanguageMask, "mask")
    _check_kinds(patches.gates, Gate, "gate")
    checks.optional_name(patches.name, "patch set, name")
    if patches.base is not None and not isinstance(patches.base, BaseIdentity):
        raise FormatError(
            f"patch set, base: expected a BaseIdentity, found {type(patches.base).__name__}; use identity.identify"
        )
    for name, part in patches.parts.items():
        if name.split(".")[0] in ("masks", "gates"):
            raise FormatError(
                f"part {name!r}: expected a name that does not begin with 'masks.' or 'gates.'; rename the part"
            )
        _check_references(patches, name, part)
    seen: set[str] = set()
    for record in patches.edits:
        if not isinstance(record, EditRecord):
            raise FormatError(
                f"patch set, edits: expected EditRecord, found {type(record).__name__}; make records of the edits"
            )
        if record.id in seen:
            raise FormatError(f"patch set, edits: edit id {record.id!r} occurs twice; edit ids must be unique")
        seen.add(record.id)
    for name in {name: None for record in patches.edits for name in record.rows if name not in patches.parts}:
        raise FormatError(
            f"patch set, edits: part {name!r} owns rows in the ledger, found only {sorted(patches.parts)}; add the part"
        )
    owners(patches)


def owners(patches: PatchSet) -> dict[str, list[str | None]]:
    """Part name -> the id of the edit that owns each row, None where no edit does.

    Raises `FormatError` for a row that does not exist or has two owners.
    """
    table: dict[str, list[str | None]] = {name: [None] * part.count for name, part in patches.parts.items()}
    for record in patches.edits:
        for name, rows in record.rows.items():
            for row in rows:
                where = f"edit {record.id!r}, part {name!r}, row {row}"
                if row >= len(table[name]):
                    raise FormatError(
                        f"{where}: expected a row below {len(table[name])}; the ledger and the tensors differ"
                    )
                if table[name][row] is not None:
                    raise FormatError(
                        f"{where}: expected one owner, found {table[name][row]!r} too; a row belongs to one edit"
                    )
                table[name][row] = record.id
    return table


def find(patches: PatchSet, id: str) -> EditRecord:
    """The record of one edit. Raises `MismatchError` for an id the set does not hold, with the nearest ones it does."""
    for record in patches.edits:
        if record.id == id:
            return record
    known = [record.id for record in patches.edits]
    near = difflib.get_close_matches(str(id), known, n=3) or known[:3]
    listed = ", ".join(repr(name) for name in near) + (", …" if len(known) > len(near) else "")
    raise MismatchError(
        f"edit {id!r} is not in this patch set of {len(known)} edits; it holds {listed or 'none'}; see patches.edits"
    )


def redact(patches: PatchSet, fields: str | Iterable[str] = "all") -> PatchSet:
    """The same patches with less in the ledger; the fingerprint changes, for it covers the ledger.

    "all" removes every request and message. Else the fields named are emptied in every request: of the request author,
    reason, expires, target, old_target ("target" in the versions too); of its versions subject, rephrases, locality, portability.
    Raises `FormatError` for another field.
    """
    if fields == "all":
        return replace(patches, edits=tuple(replace(record, request=None, message=None) for record in patches.edits))
    names = {fields} if isinstance(fields, str) else set(fields)
    unknown = sorted(map(str, names.difference(SHARED_FIELDS, VERSION_FIELDS)))
    if unknown:
        raise FormatError(
            f"redact: expected 'all' or fields among {', '.join((*SHARED_FIELDS, *VERSION_FIELDS))}, found {', '.join(unknown)}; "
            "texts and ids can only be removed with the whole request ('all')"
        )
    edits = tuple(
        record if record.request is None else replace(record, request=_without(record.request, names))
        for record in patches.edits
    )
    return replace(patches, edits=edits)


def _without(request: EditRequest, names: set[str]) -> EditRequest:
    inner = {"target", *VERSION_FIELDS} & names
    versions = {code: _emptied(version, inner) for code, version in request.versions.items()}
    shared = dict.fromkeys(names.intersection(SHARED_FIELDS))
    return request.model_copy(update={**shared, "versions": versions})


def _emptied(version: Version, names: set[str]) -> Version:
    return version.model_copy(update={name: Version.model_fields[name].default for name in names})


def _check_kinds(values: Mapping[str, Any], kind: Any, word: str) -> None:
    for name, value in values.items():
        checks.name(name, f"{word} {name!r}, name", plain=True)
        if not isinstance(value, kind):
            raise FormatError(
                f"{word} {name!r}: expected a {word} of xpatch.patches.types, found {type(value).__name__}; make one of it"
            )


def _check_references(patches: PatchSet, name: str, part: Part) -> None:
    where = f"part {name!r} at {part.site!r}"
    width_in, width_out = part.widths
    if part.mask is not None:
        mask = patches.masks.get(part.mask)
        if mask is None:
            raise FormatError(
                f"{where}: mask {part.mask!r} is missing; found masks {sorted(patches.masks)}; add it to the set"
            )
        if (mask.inner.shape[1], mask.outer.shape[1]) != (width_in, width_out):
            found = f"inner {list(mask.inner.shape)}, outer {list(mask.outer.shape)}"
            raise FormatError(
                f"{where}: expected mask {part.mask!r} of widths {width_in} and {width_out}, found {found}; use another mask"
            )
    if part.gate is not None:
        gate = patches.gates.get(part.gate)
        if gate is None:
            raise FormatError(
                f"{where}: gate {part.gate!r} is missing; found gates {sorted(patches.gates)}; add it to the set"
            )
        if gate.keys is not None and gate.keys.shape[1] != width_in:
            raise FormatError(
                f"{where}: expected gate {part.gate!r} with keys of width {width_in}, found {list(gate.keys.shape)}"
            )
