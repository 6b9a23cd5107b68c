"""Keeping a store tidy and sound: `collect` removes what nothing keeps, `verify` looks at everything again."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable
from itertools import pairwise

from xpatch.errors import FormatError
from xpatch.store.journal import FOLDER, Journal
from xpatch.store.place import TEMPORARY
from xpatch.store.sets import Sets, address
from xpatch.store.views import Collected, Damage, Move, Verification, short

#: An aside set of a collection that was killed: `tmp/aside-FINGERPRINT-TOKEN`.
_ASIDE = "aside-"

Report = Callable[[str, int, int], None]


def seconds(grace: datetime.timedelta | float) -> float:
    """A grace time in seconds. Raises `FormatError` for anything but a time of zero or more."""
    value = grace.total_seconds() if isinstance(grace, datetime.timedelta) else grace
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise FormatError(f"gc(grace=...): expected a timedelta or seconds, zero or more, found {grace!r}")
    return float(value)


def kept_sets(moves: tuple[Move, ...]) -> dict[str, tuple[str, ...]]:
    """Fingerprint -> the pointers whose history names it."""
    found: dict[str, dict[str, None]] = {}
    for move in moves:
        for fingerprint in (move.before, move.after):
            if fingerprint is not None:
                found.setdefault(fingerprint, {})[move.pointer] = None
    return {fingerprint: tuple(pointers) for fingerprint, pointers in found.items()}


def collect(sets: Sets, journal: Journal, grace: float, dry_run: bool) -> Collected:
    """See `PatchStore.gc`. A damaged history entry ends it before anything is removed: it may name a set."""
    place = sets.place
    aside = [name for name in place.names(TEMPORARY) if name.startswith(_ASIDE)]  # before the histories are read
    kept = kept_sets(journal.all())
    if not dry_run:
        _settle(sets, aside, set(kept))
    whole, partial = sets.found()
    old, young = [], 0
    for fingerprint in sorted((whole | partial) - set(kept)):
        if _old(sets, address(fingerprint), grace):
            old.append(fingerprint)
        else:
            young += 1
    leftovers = []
    for name in place.names(TEMPORARY):
        if name.startswith(_ASIDE):
            continue  # another collection's, at work: only who reads the histories after it may delete it
        if _old(sets, f"{TEMPORARY}/{name}", grace):
            leftovers.append(f"{TEMPORARY}/{name}")
        else:
            young += 1
    if not dry_run:
        moved = {fingerprint: f"{_ASIDE}{fingerprint}-{uuid.uuid4().hex}" for fingerprint in old}
        gone = [fingerprint for fingerprint in old if _set_aside(sets, fingerprint, moved[fingerprint], grace)]
        kept = kept_sets(journal.all())  # a publisher may have named one of them since
        old = [fingerprint for fingerprint in gone if fingerprint not in kept]
        _settle(sets, [moved[fingerprint] for fingerprint in gone], set(kept))
        for path in leftovers:
            place.remove(path)
    removed = tuple(fingerprint for fingerprint in old if fingerprint in whole)
    unfinished = [address(fingerprint) for fingerprint in old if fingerprint not in whole]
    return Collected(removed, (*unfinished, *leftovers), len(kept), young, dry_run)


def _set_aside(sets: Sets, fingerprint: str, name: str, grace: float) -> bool:
    # Its age once more: a publisher of the same set makes it young before it moves a pointer.
    return _old(sets, address(fingerprint), grace) and sets.place.move(address(fingerprint), f"{TEMPORARY}/{name}")


def _settle(sets: Sets, aside: list[str], kept: set[str]) -> None:
    """Sets that were set aside: back to their place if a history names them by now and they are missing, else deleted."""
    for name in aside:
        fingerprint = name.removeprefix(_ASIDE).partition("-")[0]
        if fingerprint in kept and not sets.has(fingerprint):
            sets.place.remove(address(fingerprint))  # what may be left of an upload
            sets.place.move(f"{TEMPORARY}/{name}", address(fingerprint))
        else:
            sets.place.remove(f"{TEMPORARY}/{name}")


def _old(sets: Sets, path: str, grace: float) -> bool:
    age = sets.place.age(path)
    return age is not None and age >= grace


def verify(sets: Sets, journal: Journal, report: Report | None = None) -> Verification:
    """See `PatchStore.verify`."""
    place = sets.place
    damage: list[Damage] = []
    moves: list[Move] = []
    numbers = journal.numbers()
    for pointer, found in numbers.items():
        moves += _sound_moves(journal, pointer, found, damage)
    kept = kept_sets(tuple(moves))
    whole, partial = sets.found()
    for fingerprint in sorted(set(kept) - whole):
        where = place.where(address(fingerprint))
        found_what = "half of it" if fingerprint in partial else "nothing"
        damage.append(
            Damage(
                where,
                f"{where}: expected the set {short(fingerprint)}, found {found_what}; publish it again",
                kept[fingerprint],
            )
        )
    for done, fingerprint in enumerate(sorted(whole), start=1):
        try:
            sets.get(fingerprint)
        except FormatError as error:
            damage.append(Damage(place.where(address(fingerprint)), str(error), kept.get(fingerprint, ())))
        if report is not None:
            report("verifying", done, len(whole))
    leftovers = len(partial - set(kept)) + len(place.names(TEMPORARY))
    return Verification(len(whole), sum(map(len, numbers.values())), leftovers, tuple(damage))


def _sound_moves(journal: Journal, pointer: str, numbers: list[int], damage: list[Damage]) -> list[Move]:
    """The entries that read well; what does not, and what is missing between them, goes to `damage`."""
    where = journal.place.where(f"{FOLDER}/{pointer}")
    for number in sorted(set(range(1, numbers[-1] + 1)) - set(numbers)):
        damage.append(Damage(where, f"{where}: expected move {number}, found no such entry; restore it", (pointer,)))
    sound: list[Move] = []
    for number in numbers:
        try:
            sound += journal.read([(pointer, number)])
        except FormatError as error:
            damage.append(Damage(where, str(error), (pointer,)))
    for earlier, later in pairwise(sound):
        if later.number == earlier.number + 1 and later.before != earlier.after:
            text = (
                f"{where}: expected move {later.number} to start from {short(earlier.after)}, found {short(later.before)}; "
                "one of the two was replaced; restore it"
            )
            damage.append(Damage(where, text, (pointer,)))
    return sound
