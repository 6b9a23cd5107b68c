"""Cases to ask: a file of edit requests, or the bundled ones."""

from __future__ import annotations

from pathlib import Path

from xpatch.patches.requests import EditRequest

BUNDLED = "bundled"


def read_cases(name: str) -> list[EditRequest]:
    """The edit requests of the JSONL file `name`; for "bundled", where no file is called so, the verifier's edit set in every wording.

    Raises `FormatError` for a file that cannot be read.
    """
    from xpatch.patches.requests import read_requests

    if name != BUNDLED or Path(name).exists():
        return read_requests(Path(name))
    from xpatch.zoo.verifier import data

    return data.requests("edit", rephrases=tuple(range(1, data.TEMPLATES)))
