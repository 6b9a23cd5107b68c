"""Names in messages: the ones nearest to a wrong one, and lists cut to a readable length."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

SHOWN = 8


def some(names: Sequence[str], limit: int = SHOWN) -> str:
    """The first `limit` names and how many more there are; "none" for none."""
    if not names:
        return "none"
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"


def near(name: str, names: Sequence[str], limit: int = SHOWN) -> str:
    """As `some`, with the `limit` names most like `name` where there are more; a shared last component counts most."""
    if len(names) <= limit:
        return some(names)
    last = name.rpartition(".")[2]
    matcher = SequenceMatcher(None, b=name, autojunk=False)  # `b` is what it indexes, once for all names

    def likeness(other: str) -> tuple[bool, float]:
        matcher.set_seq1(other)
        return other.rpartition(".")[2] == last, matcher.ratio()

    closest = set(sorted(names, key=likeness, reverse=True)[:limit])
    shown = ", ".join(other for other in names if other in closest)
    return f"{shown}, and {len(names) - limit} more"
