"""The mark: the file that tells a store from any other folder, and its format version."""

from __future__ import annotations

import json

from xpatch._version import __version__
from xpatch.errors import FormatError
from xpatch.store.local import LOCK_FILE
from xpatch.store.place import TEMPORARY, Place

MARK_FILE = "xpatch_store.json"
FORMAT_VERSION = 1


def mark() -> bytes:
    """The content of a new store's mark."""
    return (json.dumps({"format_version": FORMAT_VERSION, "written_by": f"xpatch {__version__}"}) + "\n").encode()


def is_store(place: Place) -> bool:
    """Whether a store is there. Raises `FormatError` for a place that holds other things, or a store of a newer xpatch."""
    data = place.read([MARK_FILE]).get(MARK_FILE)
    if data is None:
        _check_empty(place)
        return False
    try:
        version = json.loads(data)["format_version"]
    except (ValueError, TypeError, KeyError):
        version = None
    where = place.where(MARK_FILE)
    if isinstance(version, bool) or not isinstance(version, int):
        raise FormatError(
            f"{where}: expected the mark of a patch store with its format version, found {data[:60]!r}; restore it: "
            f'{{"format_version": {FORMAT_VERSION}}}'
        )
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where}: expected format version {FORMAT_VERSION} or older, found {version}, written by a newer xpatch; "
            "upgrade: pip install --upgrade xpatch"
        )
    return True


def _check_empty(place: Place) -> None:
    ours = (TEMPORARY, LOCK_FILE)  # of a first publish that was interrupted
    others = [name for name in place.names("") if name not in ours and not name.startswith(".")]
    # Both are read anew: another publisher may have made the store since the mark was looked for.
    if others and MARK_FILE not in others:
        raise FormatError(
            f"{place.where()}: expected a patch store or an empty place, found {others[0]!r} and no {MARK_FILE}; "
            "give the store's own folder, or a new one"
        )
