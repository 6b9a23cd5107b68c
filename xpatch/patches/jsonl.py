"""JSONL files as people write them: one JSON value a line, and errors that name the line and its content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xpatch.errors import FormatError

SHOWN = 120


def read_jsonl(path: str | Path, what: str, holds: str) -> Iterator[tuple[str, Any]]:
    """(where, value) of every line that is not blank; `where` names the file and the line for later errors.

    what: "request file", say; holds: what one line is. Raises `FormatError` where the file cannot be read or a line is not JSON.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 may stand inside a text
    except FileNotFoundError:
        raise FormatError(f"{what} {path} does not exist; give the path of a JSONL file, one {holds} a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{what} {path} cannot be read: {error}; give a JSONL file, one {holds} a line") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{what} {path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise FormatError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}): {shorten(line)}"
            ) from None


def shorten(text: str, limit: int = SHOWN) -> str:
    """`text`, cut to `limit` characters with a sign that it was."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
