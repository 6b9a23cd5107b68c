"""`PatchStore`: publish, get, roll back, compare, tidy up. The package docstring says what lies where, and why that is safe."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from xpatch.errors import ConflictError, FormatError, MismatchError
from xpatch.patches import checks
from xpatch.patches.limits import DEFAULT, Limits
from xpatch.patches.store import load
from xpatch.patches.types import PatchSet
from xpatch.store import keep
from xpatch.store.compare import SetDiff, compare
from xpatch.store.gate import Texts, check
from xpatch.store.journal import Journal, check_name
from xpatch.store.listing import make_listing
from xpatch.store.mark import MARK_FILE, is_store, mark
from xpatch.store.moving import conflict, named_before, steps_back
from xpatch.store.place import open_place
from xpatch.store.sets import Sets, looks_like_prefix
from xpatch.store.views import Action, Collected, History, Listing, Move, Verification, short

if TYPE_CHECKING:
    from xpatch.patches.signing import Key

PRODUCTION = "production"
DAY = datetime.timedelta(days=1)

Ref = PatchSet | str
Report = Callable[[str, int, int], None]


class PatchStore:
    """Published patch sets in a folder or behind an fsspec URL (s3://, gs://, az://, memory://, …), and the pointers to them.

    url: a local path or a URL; what is not there yet is made by the first `publish`. storage_options (or plain keywords): what
    fsspec takes for this URL, such as `endpoint_url=` or `key=`; without them the environment decides. limits: what is too large
    to be read, as in `xpatch.load`.

    A *ref* names a set: a pointer's name, four or more characters of a fingerprint, or the `PatchSet` itself; a pointer wins
    over a fingerprint that begins with its name.

    Any number of threads and processes may use one store. Raises `FormatError` where the address cannot be reached or holds
    something else, `BackendError` where a package for it is missing.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        limits: Limits | None = None,
        storage_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._place = open_place(url, {**(storage_options or {}), **options})
        self._sets, self._journal = Sets(self._place, DEFAULT if limits is None else limits), Journal(self._place)
        self._prepared = False
        self._exists = is_store(self._place)

    @property
    def url(self) -> str:
        """The address: an absolute path or the URL."""
        return self._place.where()

    def __repr__(self) -> str:
        return f"PatchStore({self.url!r})"

    # Reading.

    def get(self, ref: Ref = PRODUCTION, *, trusted_keys: Iterable[Key] | Key | None = None) -> PatchSet:
        """The set a ref names, whole: its fingerprint is checked. Its name is the one it was published with.

        trusted_keys: public keys, one of which must have signed the set, as in `xpatch.load`.
        Raises `MismatchError` for a ref that names nothing or several sets, `FormatError` for a set that is damaged or not trusted.
        """
        return self._sets.get(self.resolve(ref), trusted_keys)

    def resolve(self, ref: Ref = PRODUCTION) -> str:
        """The fingerprint of the set a ref names. Raises `MismatchError` where it names none, or several."""
        if isinstance(ref, PatchSet):
            return ref.fingerprint
        if not isinstance(ref, str) or not ref.strip():
            raise MismatchError(f"{self.url}: expected a pointer's name, a fingerprint or a PatchSet, found {ref!r}")
        try:
            checks.name(ref, "ref", plain=True)
        except FormatError:
            raise MismatchError(
                f"{self.url}: expected a pointer's name or the start of a fingerprint, found {ref!r}; check the spelling"
            ) from None
        self._check_exists()
        move = None if len(ref) == 64 and looks_like_prefix(ref) else self._journal.head(ref)
        if move is not None:
            return move.after
        return self._sets.complete(ref) if looks_like_prefix(ref) else self._journal.known(ref).after

    def current(self, pointer: str = PRODUCTION) -> Move:
        """The newest move of a pointer; its `after` is what the pointer names. Cheap enough to be asked again and again.

        Raises `MismatchError` for an unknown pointer, `FormatError` for a damaged entry.
        """
        self._check_exists()
        return self._journal.known(check_name(pointer))

    def history(self, pointer: str = PRODUCTION) -> History:
        """Every move of a pointer, oldest first; prints newest first. Raises as `current`."""
        self._check_exists()
        return History(pointer, self._journal.moves(check_name(pointer)))

    def list(self) -> Listing:
        """Every pointer with its newest move, and every set. A set that cannot be read is listed with its problem."""
        self._check_exists()
        return make_listing(self.url, self._sets, self._journal)

    def diff(self, before: Ref, after: Ref = PRODUCTION) -> SetDiff:
        """Which edits the set `after` adds to, removes from and changes in the set `before`, and in which languages.

        Raises as `get`.
        """
        sets = (ref if isinstance(ref, PatchSet) else self.get(ref) for ref in (before, after))
        return compare(*sets)

    def verify(self, progress: Report | None = None) -> Verification:
        """Load and hash every set and every history entry again; damage is reported, not raised.

        progress: called as `progress("verifying", done, total)`.
        """
        self._check_exists()
        return keep.verify(self._sets, self._journal, progress)

    # Writing.

    def publish(
        self,
        patches: PatchSet | str | Path,
        pointer: str = PRODUCTION,
        message: str | None = None,
        author: str | None = None,
        expect: Ref | EllipsisType | None = ...,
        *,
        model: Any = None,
        tokenizer: Any = None,
        must_not_change: Texts | None = None,
        must_hold: Texts | None = None,
        progress: Report | None = None,
    ) -> Move:
        """Put a set into the store and let `pointer` name it; returns the move. All or nothing, and safe to repeat.

        patches: a set, or a patch folder to load. A set the pointer names already is not published again: the move that did it
        is returned. author: by default the name of the user who runs this.
        expect: the ref of the set the pointer must name now, None: the pointer must be new; by default whatever it names when
        the call begins. If another writer moves it before this call does, nothing is moved.

        With `model` and `tokenizer` (a sequence classifier) the set is checked to fit, and asked first:
        must_not_change: texts whose prediction with this set must be the base model's: a JSONL file (or a list) of
        {"text", "text_pair"?, "language"?}. must_hold: texts that must give their target with this set: the same with
        "target", or edit requests, whose every version and rephrase is asked. The model itself is never touched.
        progress: called as `progress("checking", done, total)`.

        Raises `ConflictError` where the pointer was moved meanwhile or a prediction is not as it must be, `MismatchError` where
        the set does not fit the model, `FormatError` for bad names, texts or a place that cannot be written. The pointer is then
        where it was; of a set that lost a race, `gc` removes the files.
        """
        patches = load(patches) if isinstance(patches, (str, Path)) else patches
        if not isinstance(patches, PatchSet):
            raise MismatchError(
                f"publish(patches): expected a PatchSet or a patch folder, found {type(patches).__name__}; make one with xpatch.edit"
            )
        head = self._head_to_move(pointer, message, author, expect, patches.fingerprint)
        self._place.check_writable()
        checked: dict[str, int] = {}
        if model is not None or must_not_change is not None or must_hold is not None:
            checked = check(
                patches,
                model,
                tokenizer,
                must_not_change=must_not_change,
                must_hold=must_hold,
                refused=f"{self.url}, pointer {pointer!r}: {short(patches.fingerprint)} was not published and nothing was written",
                report=progress,
            )
        self._prepare()
        self._sets.put(patches)
        if head is not None and head.after == patches.fingerprint:
            return head
        move = self._move(pointer, head, patches.fingerprint, "publish", message, author, checked)
        if not self._sets.has(patches.fingerprint):  # a collection that did not know of this move yet
            self._sets.put(patches)
        return move

    def rollback(
        self,
        pointer: str = PRODUCTION,
        steps: int = 1,
        *,
        to: str | PatchSet | None = None,
        message: str | None = None,
        author: str | None = None,
        expect: Ref | EllipsisType = ...,
    ) -> Move:
        """Let `pointer` name an earlier set again; returns the move, which is one more entry of the history.

        steps: how many published sets to go back. What was rolled back does not count any more, so two rollbacks of one step
        go two sets back. to: instead of `steps`, a set this pointer has named before, by fingerprint (or its start); forward too.
        expect: as in `publish`. The set is loaded and checked before the pointer moves.

        Raises `MismatchError` where the pointer has not been that far back or never named `to`, `FormatError` for a damaged set,
        `ConflictError` where another writer moves the pointer meanwhile.
        """
        self._check_exists()
        head = self._head_to_move(pointer, message, author, expect, None)
        if head is None:
            head = self._journal.known(pointer)
        moves = self._journal.moves(pointer)[: head.number]
        if to is None:
            target = steps_back(self.url, pointer, moves, steps)
        else:
            target = named_before(self.url, pointer, moves, self.resolve(to))
        self._sets.get(target)
        return head if target == head.after else self._move(pointer, head, target, "rollback", message, author, {})

    def gc(self, grace: datetime.timedelta | float = DAY, dry_run: bool = False) -> Collected:
        """Remove sets that no history names, unfinished uploads and temporary files, if older than `grace` (seconds or timedelta).

        What a pointer names or ever named stays, for `rollback`. grace: longer than any publisher takes from its upload to its
        move, the clocks' difference included. dry_run: only say what would go.
        Raises `FormatError` and removes nothing where a history entry is damaged: it may name a set.
        """
        self._check_exists()
        return keep.collect(self._sets, self._journal, keep.seconds(grace), dry_run)

    # Steps of the above.

    def _check_exists(self) -> None:
        self._exists = self._exists or is_store(self._place)
        if not self._exists:
            raise FormatError(
                f"{self.url}: expected a patch store, found nothing; check the address, or publish a set to make the store"
            )

    def _prepare(self) -> None:
        if not self._prepared:
            if not self._exists:
                self._place.create(MARK_FILE, mark())
            self._place.prepare(MARK_FILE)
            self._exists = self._prepared = True

    def _head_to_move(self, pointer: str, message: Any, author: Any, expect: Any, wanted: str | None) -> Move | None:
        """The newest move, with the caller's words and expectation checked against it."""
        check_name(pointer)
        checks.optional_text(message, "message")
        checks.optional_text(author, "author")
        head = self._journal.head(pointer)
        if head is None:
            for other in self._journal.numbers():
                if other.casefold() == pointer.casefold():  # one folder on some disks, two on others
                    raise ConflictError(
                        f"{self.url}: there is a pointer {other!r}, and {pointer!r} differs from it in case only; use the one that is there"
                    )
        if expect is not ...:
            expected = None if expect is None else self.resolve(expect)
            if expected != (None if head is None else head.after):
                raise conflict(self.url, pointer, expected, head, wanted)
        return head

    def _move(
        self,
        pointer: str,
        head: Move | None,
        after: str,
        action: Action,
        message: str | None,
        author: str | None,
        checked: dict[str, int],
    ) -> Move:
        move = self._journal.append(
            pointer, head, after, action=action, author=author, message=message, checked=checked
        )
        if move is not None:
            return move
        now = self._journal.head(pointer)
        if now is not None and now.after == after:  # somebody else did the same
            return now
        raise conflict(self.url, pointer, None if head is None else head.after, now, after)
