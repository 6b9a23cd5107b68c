"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The first column aligned left, the others right."""
    lines = ["|".join(("", *(f" {cell} " for cell in row), "")) for row in (heads, *body)]
    rule = "|" + "|".join(["---", *["---:"] * (len(heads) - 1)]) + "|"
    return "\n".join((lines[0], rule, *lines[1:]))
