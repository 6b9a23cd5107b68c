"""The texts to watch a model on: given one by one, or in a file (JSONL, or plain text with one text a line)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpatch.errors import FormatError
from xpatch.patches.jsonl import read_jsonl, shorten
from xpatch.patches.probes import as_probe
from xpatch.patches.requests import EditRequest, Probe

JSONL = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Text:
    """One text (or text pair) and its language, where that is known."""

    probe: Probe
    language: str | None = None


Texts = Iterable["Text | Probe | str | Mapping[str, Any]"] | str | Path
"""Texts, probes, or mappings `{"text", "language"?, "text_pair"?}`; or the path of a file of them."""


def as_texts(texts: Texts) -> list[Text]:
    """Checked texts. A file called .jsonl holds one mapping (or JSON string) a line, any other file one plain text a line.

    Raises `FormatError` naming the line (or position) and the field, and for no text at all.
    """
    if isinstance(texts, (str, Path)):
        found = _read(Path(texts))
        source = f"text file {texts}"
    else:
        found = [_text(item, f"text {position}") for position, item in enumerate(texts, start=1)]
        source = "the texts given"
    if not found:
        raise FormatError(f"{source}: expected at least one text, found none")
    return found


def texts_of(requests: Iterable[EditRequest]) -> list[Text]:
    """Every text of the requests, each once: the edited texts, their rephrases, and the texts that must not change."""
    found: dict[tuple[str, str, str | None], Text] = {}
    for request in requests:
        for language, version in request.versions.items():
            for probe in (version.probe, *version.rephrases, *version.locality):
                found.setdefault((language, probe.text, probe.text_pair), Text(probe, language))
    return list(found.values())


def _read(path: Path) -> list[Text]:
    if path.suffix.lower() in JSONL:
        return [_text(value, where) for where, value in read_jsonl(path, "text file", "text")]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise FormatError(
            f"text file {path} does not exist; give a file of one text a line, or a .jsonl file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"text file {path} cannot be read: {error}; give a UTF-8 text file") from None
    return [Text(Probe(text=line.strip())) for line in lines if line.strip()]


def _text(item: Any, where: str) -> Text:
    if isinstance(item, Text):
        return item
    if isinstance(item, Mapping):
        fields = dict(item)
        language = fields.pop("language", None)
        if language is not None and (not isinstance(language, str) or not language):
            raise FormatError(
                f"{where}: language: expected a language code such as 'en', found {shorten(repr(language))}"
            )
        return Text(as_probe(fields, where), language)
    return Text(as_probe(item, where))
