"""`xpatch_export.json`: what a folder of exported weights was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from xpatch._version import __version__

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet

NOTE_FILE = "xpatch_export.json"


def write_note(folder: Path, kind: str, patches: PatchSet) -> None:
    """Name the kind of export, the set's fingerprint, and the edits it holds; the requests' texts stay in the patch folder."""
    found = {
        "written_by": f"xpatch {__version__}",
        "kind": kind,
        "fingerprint": patches.fingerprint,
        "edits": [record.id for record in patches.edits],
    }
    (folder / NOTE_FILE).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
