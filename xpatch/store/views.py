"""What a store answers: frozen values that print as lines a person can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SHORT = 12

Action = Literal["publish", "rollback"]


def short(fingerprint: str | None) -> str:
    """The start of a fingerprint, as people write it; "nothing" for None."""
    return "nothing" if fingerprint is None else fingerprint[:SHORT]


@dataclass(frozen=True)
class Move:
    """One entry of a pointer's history. before: what the pointer named until then, None for its first move. time: ISO 8601, UTC.

    checked: what the acceptance gate asked and found right, such as {"must_not_change": 120}; empty where it was not asked.
    """

    pointer: str
    number: int
    action: Action
    before: str | None
    after: str
    author: str | None
    message: str | None
    time: str
    checked: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.pointer} #{self.number}  {self.time}  {self.action}  {short(self.before)} -> {short(self.after)}"
        checked = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.checked.items())
        return "  ".join(
            text for text in (head, self.author, self.message, checked and f"[checked: {checked}]") if text
        )


@dataclass(frozen=True)
class History:
    """Every move of one pointer, oldest first."""

    pointer: str
    moves: tuple[Move, ...]

    def __iter__(self) -> Iterator[Move]:
        return iter(self.moves)

    def __len__(self) -> int:
        return len(self.moves)

    def __getitem__(self, index: int) -> Move:
        return self.moves[index]

    def __str__(self) -> str:
        return "\n".join(str(move) for move in reversed(self.moves))


@dataclass(frozen=True)
class StoredSet:
    """One set of the store. nbytes: its tensors in fp32. pointers: those that name it now. published: the time of its first move,
    None for a set no history names. problem: why its config cannot be read, else None.
    """

    fingerprint: str
    name: str | None
    edits: int
    languages: tuple[str, ...]
    nbytes: int
    pointers: tuple[str, ...]
    published: str | None
    problem: str | None = None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{short(self.fingerprint)}  damaged: {self.problem}"
        named = f"  <- {', '.join(self.pointers)}" if self.pointers else ""
        spoken = f" in {', '.join(self.languages)}" if self.languages else ""
        what = f"{count(self.edits, 'edit')}{spoken}, {self.nbytes / 1024:.1f} KiB"
        return f"{short(self.fingerprint)}  {self.published or 'not published':<29}  {what}{named}"


@dataclass(frozen=True)
class Listing:
    """What is in a store: the newest move of every pointer, and the sets, the last published first."""

    url: str
    pointers: tuple[Move, ...]
    sets: tuple[StoredSet, ...]

    def __str__(self) -> str:
        lines = [f"{self.url}: {count(len(self.pointers), 'pointer')}, {count(len(self.sets), 'set')}"]
        return "\n".join([*lines, *(str(move) for move in self.pointers), *(str(item) for item in self.sets)])


@dataclass(frozen=True)
class Collected:
    """What `gc` removed (or, with `dry_run`, would remove). leftovers: unfinished uploads and temporary files, as paths.

    young: sets and leftovers that nothing keeps but that are younger than the grace time; kept: sets the histories keep.
    """

    removed: tuple[str, ...]
    leftovers: tuple[str, ...]
    kept: int
    young: int
    dry_run: bool

    def __str__(self) -> str:
        verb = "would remove" if self.dry_run else "removed"
        return (
            f"{verb} {count(len(self.removed), 'set')} and {count(len(self.leftovers), 'leftover')}; "
            f"{count(self.kept, 'set')} kept by the histories, {self.young} too young to touch"
        )


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written. kept_by: the pointers whose history keeps it; () where no history needs it."""

    where: str
    problem: str
    kept_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = f" (kept by {', '.join(self.kept_by)})" if self.kept_by else ""
        return self.problem + kept


@dataclass(frozen=True)
class Verification:
    """Every set loaded and hashed again, every history entry hashed and matched with its neighbours.

    sets, moves: how many were looked at. leftovers: unfinished uploads and temporary files; they harm nobody, `gc` removes them.
    """

    sets: int
    moves: int
    leftovers: int
    damage: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def __str__(self) -> str:
        head = f"{count(self.sets, 'set')} and {count(self.moves, 'move')} looked at, {count(self.leftovers, 'leftover')}, "
        head += f"{len(self.damage)} damaged" if self.damage else "no damage"
        return "\n".join([head, *(f"- {item}" for item in self.damage)])


def count(number: int, word: str) -> str:
    """ "1 set", "2 sets"."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def listed(items: Sequence[Any], limit: int = 5) -> str:
    """ "a, b, c and 4 more", or "none"."""
    shown = ", ".join(str(item) for item in items[:limit])
    return (shown + (f" and {len(items) - limit} more" if len(items) > limit else "")) or "none"
