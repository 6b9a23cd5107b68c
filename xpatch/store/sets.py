"""The sets of a store, each a patch folder under its fingerprint, and the names people give them: prefixes."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from xpatch.errors import FormatError, MismatchError
from xpatch.patches.limits import Limits
from xpatch.patches.signatures import signature_json
from xpatch.patches.store import CONFIG_FILE, SIGNATURE_FILE
from xpatch.patches.types import PatchSet
from xpatch.store.place import TEMPORARY, Place
from xpatch.store.views import listed, short

FOLDER = "sets"
LEAST_PREFIX = 4
_ADDRESS = re.compile(rf"{FOLDER}/([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})(?:/(.+))?")
_PREFIX = re.compile(r"[0-9a-f]{1,64}")


def address(fingerprint: str) -> str:
    """The folder of a set: its path in the store."""
    return f"{FOLDER}/{fingerprint[:2]}/{fingerprint}"


def looks_like_prefix(text: str) -> bool:
    """Whether `text` could be the start of a fingerprint."""
    return _PREFIX.fullmatch(text) is not None


class Sets:
    """Reads and writes the sets of one place."""

    def __init__(self, place: Place, limits: Limits) -> None:
        self.place = place
        self.limits = limits

    def found(self, below: str = FOLDER) -> tuple[set[str], set[str]]:
        """(fingerprints of whole sets, of folders without a config: uploads at work or given up)."""
        return grouped(self.place.files(below))

    def has(self, fingerprint: str) -> bool:
        """Whether the set is there, whole as far as its config tells."""
        path = f"{address(fingerprint)}/{CONFIG_FILE}"
        return path in self.place.read([path])

    def get(self, fingerprint: str, trusted_keys: Any = None) -> PatchSet:
        """The set, checked against its fingerprint. Raises `FormatError` where it is missing, damaged or not trusted."""
        folder = address(fingerprint)
        where = self.place.where(folder)
        try:
            patches = self.place.load(folder, self.limits)
        except FormatError as error:
            raise FormatError(
                f"patch set {short(fingerprint)}: {error}. Publish the same set again to repair it, or roll back to another"
            ) from None
        if patches.fingerprint != fingerprint:
            raise FormatError(
                f"{where}: expected the set {short(fingerprint)} its folder is named after, found {short(patches.fingerprint)}; "
                f"somebody changed the folder: publish {short(fingerprint)} again to repair it, or roll back to another"
            )
        if trusted_keys is not None:
            from xpatch.patches.signing import verify

            verify(patches, trusted_keys)
        return replace(patches, name=None) if patches.name == fingerprint else patches

    def put(self, patches: PatchSet) -> None:
        """Make sure the set is there, whole, young and with these signatures; a damaged copy is replaced.

        The copy that is there keeps its name and times, which are no part of the fingerprint, and signatures by other keys.
        """
        folder = address(patches.fingerprint)
        there = None
        if self.place.files(folder):
            try:
                there = self.get(patches.fingerprint)
            except FormatError:
                self.place.move(folder, f"{TEMPORARY}/{uuid.uuid4().hex}")
        if there is None:
            self.place.put(folder, patches)
            return
        self.place.touch(folder)
        signatures = {each.key_id: each for each in (*there.signatures, *patches.signatures)}
        if set(signatures.values()) != set(there.signatures):
            self.place.replace(f"{folder}/{SIGNATURE_FILE}", signature_json(signatures.values()).encode())

    def complete(self, prefix: str) -> str:
        """The fingerprint that begins with `prefix`. Raises `MismatchError` where none or several do."""
        where = self.place.where()
        if len(prefix) < LEAST_PREFIX:
            raise MismatchError(
                f"{where}: expected a pointer's name or at least {LEAST_PREFIX} characters of a fingerprint, found {prefix!r}; check it"
            )
        whole, _ = self.found(f"{FOLDER}/{prefix[:2]}")
        fitting = sorted(fingerprint for fingerprint in whole if fingerprint.startswith(prefix))
        if len(fitting) > 1:
            raise MismatchError(
                f"{where}: expected the start of one fingerprint, found {prefix!r}, the start of {len(fitting)}: "
                f"{listed([fingerprint[: len(prefix) + 8] for fingerprint in fitting])}; give more of it"
            )
        if not fitting:
            raise MismatchError(
                f"{where}: no pointer is called {prefix!r} and no set's fingerprint begins with it; look at `xpatch store list {where}`"
            )
        return fitting[0]


def grouped(files: Iterable[str]) -> tuple[set[str], set[str]]:
    """See `Sets.found`."""
    seen: dict[str, bool] = {}
    for path in files:
        match = _ADDRESS.fullmatch(path)
        if match is not None and match[3] is not None:
            seen[match[2]] = seen.get(match[2], False) or match[3] == CONFIG_FILE
    return {key for key, whole in seen.items() if whole}, {key for key, whole in seen.items() if not whole}
