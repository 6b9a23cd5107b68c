"""Edits that end by themselves: `EditRequest.expires`, read as a moment, and sets without what has expired.

`expires` is ISO 8601: a date ("2030-01-31") ends with that day in UTC, so the edit still counts all through it; a date and time
("2030-01-31T12:00:00+02:00", "2030-01-31 12:00Z") ends at that very moment, in UTC where it names no zone. The request holds
it, so a set whose requests were redacted ("all" or "expires") no longer expires.
"""

from __future__ import annotations

import re
import warnings
from datetime import datetime, timedelta, timezone

from pydantic import TypeAdapter, ValidationError

from xpatch.errors import FormatError
from xpatch.patches import compose
from xpatch.patches.forms import DenseDelta
from xpatch.patches.jsonl import shorten
from xpatch.patches.types import EditRecord, PatchSet

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
# The forms every Python and every library reads alike; pydantic alone would take "1700000000" for a moment too.
_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,6})?)?(Z|[+-][0-9]{2}:[0-9]{2})?"
)
_READ = TypeAdapter(datetime)
_LISTED = 5


def expiry_of(text: str, where: str) -> datetime:
    """The moment from which an edit counts no longer, with its time zone. Raises `FormatError` for another text."""
    try:
        if _DATE.fullmatch(text):
            day = datetime.fromisoformat(text).replace(tzinfo=timezone.utc)
            return day if day.date() == datetime.max.date() else day + timedelta(days=1)
        if _MOMENT.fullmatch(text):
            moment = _READ.validate_python(text)
            return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)
    except (ValueError, ValidationError):
        pass
    raise FormatError(
        f"{where}: expected a date or a date and time such as '2030-01-31' or '2030-01-31T12:00:00Z', found {shorten(repr(text))}; "
        "correct the request and train it again, or take the date away: patches.redact('expires')"
    )


def expired(patches: PatchSet, now: datetime | None = None) -> tuple[str, ...]:
    """The ids of the edits that have expired, in the set's order, whether they can be taken out or not.

    now: the moment to ask about (UTC where it names no zone); the clock's by default. Raises `FormatError` for an `expires` that
    cannot be read.
    """
    moment = _moment(now)
    return tuple(record.id for record in patches.expiring if _has_expired(record, moment))


def without_expired(patches: PatchSet, now: datetime | None = None) -> tuple[PatchSet, tuple[str, ...]]:
    """The set without its expired edits, and the ids of those taken out; the set itself where there are none.

    Edits that cannot be separated (one group, one shared part, a part without an owner; see `compose`) go together, when the last
    of them has expired. Until then the expired ones stay and a warning names them. Not the other way round: an edit that has not
    expired was promised to its author and taking it away silently breaks an answer, while raising would stop a whole service at a
    moment nobody watches. Whoever needs an edit to end on its day trains it so that it can be separated.

    now: as for `expired`. Raises `FormatError` for an `expires` that cannot be read: whether such an edit counts cannot be guessed.
    """
    over = set(expired(patches, now))
    if not over:
        return patches, ()
    stays = _kept_company(patches, over)
    gone = tuple(record.id for record in patches.edits if record.id in over and record.id not in stays)
    kept = [record.id for record in patches.edits if record.id in over and record.id in stays]
    if kept:
        listed = ", ".join(repr(id) for id in kept[:_LISTED]) + (
            f" and {len(kept) - _LISTED} more" if kept[_LISTED:] else ""
        )
        warnings.warn(
            f"expired edits {listed} stay in force: they share their patches with edits that have not expired and cannot be taken "
            "out alone; train the others again without them, or drop them together",
            UserWarning,
            stacklevel=2,
        )
    return (compose.drop(patches, gone) if gone else patches), gone


def _kept_company(patches: PatchSet, over: set[str]) -> set[str]:
    """The edits that stay because one they cannot be separated from stays: the same bonds as in `compose`."""
    ownership = compose.part_ownership(patches)
    members: dict[tuple[str, str], list[str]] = {}
    bonds: dict[str, list[tuple[str, str]]] = {}
    for record in patches.edits:
        own = [("part", name) for name in record.rows if ownership[name] == "shared"]
        bonds[record.id] = own + ([("group", record.group)] if record.group else [])
        for bond in bonds[record.id]:
            members.setdefault(bond, []).append(record.id)
    bare = {isinstance(patches.parts[name], DenseDelta) for name, state in ownership.items() if state == "bare"}
    pending = [
        record.id
        for record in patches.edits
        if record.id not in over or any(compose.may_own(record, ownership, whole=whole) for whole in bare)
    ]
    stays = set(pending)
    spread: set[tuple[str, str]] = set()
    while pending:
        for bond in bonds[pending.pop()]:
            if bond not in spread:
                spread.add(bond)
                fresh = [id for id in members[bond] if id not in stays]
                stays.update(fresh)
                pending.extend(fresh)
    return stays


def _has_expired(record: EditRecord, now: datetime) -> bool:
    text = record.request.expires if record.request is not None else None
    return text is not None and expiry_of(text, f"edit {record.id!r}, expires") <= now


def _moment(now: datetime | None) -> datetime:
    if now is None:
        return datetime.now(timezone.utc)
    return now if now.tzinfo is not None else now.replace(tzinfo=timezone.utc)
