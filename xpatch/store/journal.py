"""The histories: `history/POINTER/00000007.json`, one file a move, never rewritten; the highest number is the pointer."""

from __future__ import annotations

import datetime
import getpass
import hashlib
import json
import re
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xpatch._version import __version__
from xpatch.errors import FormatError, MismatchError
from xpatch.patches import checks
from xpatch.store.place import Place
from xpatch.store.sets import looks_like_prefix
from xpatch.store.views import Action, Move, listed

FOLDER = "history"
FORMAT_VERSION = 1
_FILE = re.compile(rf"{FOLDER}/([^/]+)/(\d{{8}})\.json")
_NAME = re.compile(r"\d{8}\.json")
_LOOKS_HASHED = 8

Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """One file of a history. token: tells this write from any other; sha256: of everything else in the file, as canonical JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1]
    written_by: str
    pointer: str
    number: Annotated[int, Field(ge=1)]
    action: Action
    before: Fingerprint | None
    after: Fingerprint
    author: str | None
    message: str | None
    time: str
    checked: dict[str, int] = {}
    token: str
    sha256: str

    @property
    def move(self) -> Move:
        return Move(**self.model_dump(exclude={"format_version", "written_by", "token", "sha256"}))


def check_name(pointer: Any) -> str:
    """A name a pointer can have. Raises `FormatError` for another."""
    name = checks.name(pointer, "pointer, name", plain=True)
    if len(name) > 100:
        raise FormatError(f"pointer, name: expected at most 100 characters, found {len(name)}; shorten it")
    if len(name) >= _LOOKS_HASHED and looks_like_prefix(name):
        raise FormatError(
            f"pointer, name: expected a name that cannot be taken for a fingerprint, found {name!r}; rename it"
        )
    return name


class Journal:
    """Reads and extends the histories of one place."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def numbers(self) -> dict[str, list[int]]:
        """Pointer -> the numbers of its moves, ascending."""
        found: dict[str, list[int]] = {}
        for path in self.place.files(FOLDER):
            match = _FILE.fullmatch(path)
            if match is not None:
                found.setdefault(match[1], []).append(int(match[2]))
        return found

    def head(self, pointer: str) -> Move | None:
        """The newest move, or None for a pointer that has not moved yet. Raises `FormatError` for a damaged entry."""
        numbers = self._numbers(pointer)
        return self.read([(pointer, numbers[-1])])[0] if numbers else None

    def known(self, pointer: str) -> Move:
        """As `head`. Raises `MismatchError` listing the pointers there are."""
        move = self.head(pointer)
        if move is None:
            raise MismatchError(
                f"{self.place.where()}: no pointer is called {pointer!r}; pointers are {listed(sorted(self.numbers()))}; "
                "publish(patches, pointer=...) makes one"
            )
        return move

    def moves(self, pointer: str) -> tuple[Move, ...]:
        """Every move of a pointer, oldest first. Raises `MismatchError` for an unknown one, `FormatError` for a damaged entry."""
        numbers = self._numbers(pointer) or [self.known(pointer).number]
        return self.read([(pointer, number) for number in numbers])

    def all(self) -> tuple[Move, ...]:
        """Every move of every pointer."""
        return self.read([(pointer, number) for pointer, numbers in self.numbers().items() for number in numbers])

    def _numbers(self, pointer: str) -> list[int]:
        return [int(name[:8]) for name in self.place.names(f"{FOLDER}/{pointer}") if _NAME.fullmatch(name)]

    def read(self, wanted: list[tuple[str, int]]) -> tuple[Move, ...]:
        """The entries named. Raises `FormatError` for the first that is missing or damaged."""
        paths = [_path(pointer, number) for pointer, number in wanted]
        found = self.place.read(paths)
        return tuple(
            parse(found.get(path), self.place.where(path), pointer, number).move
            for path, (pointer, number) in zip(paths, wanted, strict=True)
        )

    def append(
        self,
        pointer: str,
        head: Move | None,
        after: str,
        *,
        action: Action,
        author: str | None,
        message: str | None,
        checked: dict[str, int] | None = None,
    ) -> Move | None:
        """Move `pointer` on from `head`; None where another writer has moved it since `head` was read."""
        number = 1 if head is None else head.number + 1
        content = {
            "format_version": FORMAT_VERSION,
            "written_by": f"xpatch {__version__}",
            "pointer": pointer,
            "number": number,
            "action": action,
            "before": None if head is None else head.after,
            "after": after,
            "author": author if author is not None else _user(),
            "message": message,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
            "checked": checked or {},
            "token": uuid.uuid4().hex,
        }
        entry = Entry.model_validate({**content, "sha256": _digest(content)})
        text = json.dumps(entry.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"
        return entry.move if self.place.create(_path(pointer, number), text.encode()) else None


def parse(data: bytes | None, where: str, pointer: str, number: int) -> Entry:
    """Read one entry. Raises `FormatError`: missing, not JSON, another format, changed, or of another pointer or number."""
    repair = "restore the file from a backup; `xpatch store verify` lists all damage"
    if data is None:
        raise FormatError(f"{where}: expected a history entry, found nothing; {repair}")
    try:
        content = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{where}: expected JSON, found {error}; {repair}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatError(
            f"{where}: expected format version {FORMAT_VERSION} or older, found {version}, written by a newer xpatch; "
            "upgrade: pip install --upgrade xpatch"
        )
    try:
        entry = Entry.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "entry"
        raise FormatError(f"{where}: {field}: {first['msg']}; {repair}") from None
    expected = _digest({key: value for key, value in content.items() if key != "sha256"})
    if entry.sha256 != expected:
        raise FormatError(
            f"{where}: expected sha256 {entry.sha256[:12]}, found {expected[:12]}; it was changed; {repair}"
        )
    if (entry.pointer, entry.number) != (pointer, number):
        raise FormatError(
            f"{where}: expected move {number} of {pointer!r}, found move {entry.number} of {entry.pointer!r}; {repair}"
        )
    return entry


def earlier(moves: tuple[Move, ...]) -> list[str]:
    """What a pointer named, with what was rolled back taken out: the last is what it names, before it what `rollback` goes to."""
    stack: list[str] = []
    for move in moves:
        if move.action == "rollback" and move.after in stack:
            while stack[-1] != move.after:
                stack.pop()
        else:
            stack.append(move.after)
    return stack


def _path(pointer: str, number: int) -> str:
    return f"{FOLDER}/{pointer}/{number:08d}.json"


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return None
