"""The folder that a long edit call can go on from: `call.json` (which call it is), `step-NNNNNN.safetensors` (what was read and trained, one
file a step), and in the end `result/`, the patch set, which takes the steps' place.

Every file is written to a temporary name and renamed, and a step is written once: keeping up costs what came last.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xpatch.editors.call import Call
from xpatch.editors.files import read_tensors, write_tensors, write_text
from xpatch.editors.journal import Journal, Step, Tensors
from xpatch.errors import ConflictError, FormatError
from xpatch.patches.folders import is_url
from xpatch.patches.limits import Limits
from xpatch.patches.store import load, save
from xpatch.patches.types import PatchSet

CARD, RESULT = "call.json", "result"
ANEW = "give another folder, or remove this one to begin anew"
_OWN = Limits(
    **{f.name: 1 << 62 for f in fields(Limits) if f.name != "config_depth"}
)  # what was written here is read here


class Checkpoint(Journal):
    """The journal of `call`, kept in `folder`, which is made where there is none.

    Raises `FormatError` where the folder cannot be one, `ConflictError` where it holds another call (naming what differs) or other files.
    """

    def __init__(self, folder: str | Path, call: Call) -> None:
        if is_url(folder):
            raise FormatError(f"checkpoint: expected a folder on disk, found the URL {str(folder)!r}")
        self._folder, self._next = Path(folder), 0
        if self._folder.exists() and not self._folder.is_dir():
            raise FormatError(f"checkpoint: {folder} is a file; give a folder")
        if (self._folder / CARD).is_file():
            difference = self._card().difference(call)
            if difference is not None:
                raise ConflictError(
                    f"checkpoint: {folder} belongs to another call: {difference}; call with what it was begun with to go on, {ANEW}"
                )
        else:
            found = [item.name for item in self._folder.iterdir()] if self._folder.is_dir() else []
            found = sorted(name for name in found if name != f"{CARD}.tmp" and name != ".gitignore")
            if found:
                raise ConflictError(f"checkpoint: {folder} holds other files ({found[0]} …); give a folder of its own")
            write_text(self._folder / CARD, call.model_dump_json(indent=1) + "\n")
        self._kept = 0  # steps without a gap: one that is missing would be asked for before those after it
        while self._step(self._kept).is_file():
            self._kept += 1

    def result(self) -> PatchSet | None:
        """The patch set of a call that was finished."""
        if not (self._folder / RESULT).is_dir():
            return None
        try:
            found = replace(load(self._folder / RESULT, limits=_OWN), name=None)
        except FormatError as error:
            raise FormatError(f"checkpoint: its result cannot be read: {error}; {ANEW}") from None
        self._clear()
        return found

    def finish(self, patches: PatchSet) -> None:
        """Keep the result instead of the steps."""
        save(patches, self._folder / RESULT)
        self._clear()

    def once(self, key: Mapping[str, Any], make: Callable[[], Tensors]) -> Step:
        """See `Journal.once`. A step that cannot be read, or is another than the one asked for, is made anew, as are those after it."""
        number, self._next = self._next, self._next + 1
        path = self._step(number)
        if number < self._kept:
            try:
                tensors, facts = read_tensors(path, "it is made again")
                if facts.get("key") == key:
                    return Step(tensors, float(facts["seconds"]), kept=True)
                told = f"{path} is another than expected: what leads to it came out otherwise here"
            except FormatError as error:
                told = str(error)
            warnings.warn(f"checkpoint: {told}; it and the steps after it are made again", UserWarning, stacklevel=2)
            for stale in reversed(range(number, self._kept)):  # from the end, so that no gap is left
                self._step(stale).unlink(missing_ok=True)
            self._kept = number
        begun = time.perf_counter()
        made = make()
        seconds = time.perf_counter() - begun
        write_tensors(path, made, {"key": dict(key), "seconds": seconds})
        self._kept = number + 1
        return Step(made, seconds)

    def _step(self, number: int) -> Path:
        return self._folder / f"step-{number:06}.safetensors"

    def _card(self) -> Call:
        path = self._folder / CARD
        try:
            return Call.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise FormatError(f"checkpoint: {path} cannot be read: {reason}; {ANEW}") from None

    def _clear(self) -> None:
        for path in (*self._folder.glob("step-*.safetensors*"), *self._folder.glob("*.tmp")):
            path.unlink(missing_ok=True)
        for path in (*self._folder.glob(f".{RESULT}.*.new"), *self._folder.glob(f".{RESULT}.*.old")):
            shutil.rmtree(path, ignore_errors=True)
