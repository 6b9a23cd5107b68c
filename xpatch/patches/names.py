"""Names of sets that are safe wherever people put them: folders, files, URLs, terminals.

Parts, masks and gates have narrower names (`checks.name`, plain): letters, digits, `_`, `-` and single dots. Edit ids and language
codes are keys, never file names, and may be any text.
"""

from __future__ import annotations

import re

from xpatch.errors import FormatError
from xpatch.patches.jsonl import shorten

BYTES_AT_MOST = 200  # file systems take 255; a suffix must fit too
# Separators, control characters, halves of surrogate pairs, line separators, and marks that turn the direction of writing.
_UNSAFE = re.compile("[/\\\\\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")
_DRIVE = re.compile("[A-Za-z]:")


def is_safe(name: str) -> bool:
    """Whether a file may bear this name on every system, and stays in the folder it is put in."""
    return not (
        _UNSAFE.search(name)
        or _DRIVE.match(name)
        or not name.strip(" .")  # ".", "..", and what Windows makes of ". "
        or len(name.encode("utf-8")) > BYTES_AT_MOST
    )


def check_set_name(name: str, where: str) -> str:
    """A set's name. Raises `FormatError` for one that is not safe as the name of a file."""
    if not is_safe(name):
        raise FormatError(
            f"{where}: expected a name of at most {BYTES_AT_MOST} bytes that is safe as a file name (no '/', no '\\', no control "
            f"characters, no drive letter), found {shorten(repr(name))}; give the set another name"
        )
    return name
