"""Probes as callers give them: one by one, or a JSONL file of `{"language", "text", "text_pair", "target"}` rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xpatch.errors import FormatError
from xpatch.patches.jsonl import read_jsonl, shorten
from xpatch.patches.requests import Probe


def as_probe(item: Any, where: str) -> Probe:
    """A `Probe`, its fields as a mapping, or a plain text -> a checked probe. Raises `FormatError` naming `where` and the field."""
    if isinstance(item, Probe):
        return item
    try:
        return Probe.model_validate(item)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "text"
        raise FormatError(f"{where}: {field}: {first['msg']}; found {shorten(str(item))!r}") from None


def read_probes(path: str | Path, what: str) -> dict[str, list[Probe]]:
    """language -> probes of a JSONL file. what: how messages call the file. Raises `FormatError` naming the line."""
    found: dict[str, list[Probe]] = {}
    for where, row in read_jsonl(path, what, "text"):
        if not isinstance(row, dict) or not isinstance(row.get("language"), str):
            raise FormatError(f"{where}: expected an object with 'language' and 'text', found {shorten(str(row))}")
        language = row.pop("language")
        found.setdefault(language, []).append(as_probe(row, where))
    return found
