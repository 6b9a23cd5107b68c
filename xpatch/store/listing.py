"""The table of contents: pointers and sets, read from the histories and the sets' configs alone."""

from __future__ import annotations

import math

from xpatch.errors import FormatError
from xpatch.patches.config import PatchConfig, parse_config
from xpatch.patches.store import CONFIG_FILE
from xpatch.store.journal import Journal
from xpatch.store.sets import Sets, address
from xpatch.store.views import Listing, Move, StoredSet


def make_listing(url: str, sets: Sets, journal: Journal) -> Listing:
    """See `PatchStore.list`."""
    moves = journal.all()
    heads = {move.pointer: move for move in sorted(moves, key=lambda move: move.number)}
    published: dict[str, str] = {}
    for move in moves:
        published[move.after] = min(move.time, published.get(move.after, move.time))
    whole, _ = sets.found()
    paths = {fingerprint: f"{address(fingerprint)}/{CONFIG_FILE}" for fingerprint in whole}
    configs = sets.place.read(paths.values())
    found = [
        _stored(fingerprint, configs.get(path), sets.place.where(path), heads, published.get(fingerprint))
        for fingerprint, path in paths.items()
    ]
    found.sort(key=lambda item: (item.published or "", item.fingerprint), reverse=True)
    return Listing(url, tuple(sorted(heads.values(), key=lambda move: move.pointer)), tuple(found))


def _stored(
    fingerprint: str, data: bytes | None, where: str, heads: dict[str, Move], published: str | None
) -> StoredSet:
    pointers = tuple(sorted(name for name, move in heads.items() if move.after == fingerprint))
    try:
        config = parse_config(data or b"", where=where)
    except FormatError as error:
        return StoredSet(fingerprint, None, 0, (), 0, pointers, published, problem=str(error))
    name = None if config.name == fingerprint else config.name
    return StoredSet(fingerprint, name, len(config.edits), _languages(config), _nbytes(config), pointers, published)


def _languages(config: PatchConfig) -> tuple[str, ...]:
    spoken = {code for edit in config.edits if edit.request is not None for code in edit.request.versions}
    return tuple(sorted(spoken.union(*(mask.languages for mask in config.masks.values()))))


def _nbytes(config: PatchConfig) -> int:
    values = (*config.parts.values(), *config.masks.values(), *config.gates.values())
    return 4 * sum(math.prod(shape) for value in values for shape in value.tensors.values())
