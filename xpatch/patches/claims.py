"""What requests claim, text by text, and when two claims are one claim with two answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from xpatch.patches.requests import EditRequest, Probe


@dataclass(frozen=True)
class Asked:
    """One text of a request, as it asks for it: the edited text of a version, or a rephrase of it."""

    language: str
    probe: Probe
    target: str

    @property
    def claim(self) -> tuple[str, str, str]:
        """Equal for one claim: the same text (and text pair) in the same language after `normalised`."""
        return self.language, normalised(self.probe.text), normalised(self.probe.text_pair or "")


def asked_by(request: EditRequest) -> Iterator[Asked]:
    """Every edited text and rephrase of `request` that has a target."""
    for language, version in request.versions.items():
        shared = request.target_of(language)
        for probe in (version.probe, *version.rephrases):
            target = shared if probe.target is None else probe.target
            if target is not None:
                yield Asked(language, probe, target)


def normalised(text: str) -> str:
    """Light normalisation: NFKC, case folded, one space between words, no full stop or other punctuation at the end."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while words and unicodedata.category(words[-1]).startswith(("P", "Z")):
        words = words[:-1]
    return words


def same_answer(first: str, second: str, index: Callable[[str], int | None]) -> bool:
    """Whether two targets ask for one answer: the same words, or one label of a classifier by name and by index.

    index: a target's label index; None where it is no label.
    """
    if normalised(first) == normalised(second):
        return True
    label = index(first)
    return label is not None and label == index(second)
