"""What the commands print, and where: results on stdout, chatter and errors on stderr, chatter only on a terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
WIDE = 160  # columns when the output goes to a file or a pipe, so that no table cell is cut


def stdout() -> Console:
    """Where results go. Made per call, because tests and callers swap `sys.stdout`."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDE, highlight=False, soft_wrap=False)


def stderr() -> Console:
    """Where progress, warnings and errors go."""
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDE, highlight=False, soft_wrap=True)


def interactive() -> bool:
    """Whether somebody is watching: progress and chatter are for a terminal only."""
    return sys.stderr.isatty()


def say(text: str) -> None:
    """One line of chatter, on a terminal only."""
    if interactive():
        stderr().print(text)


def warn(text: str) -> None:
    """One line that matters even in a log."""
    stderr().print(f"warning: {text}", markup=False)


def print_json(data: Any) -> None:
    """Machine-readable output: one JSON document on stdout."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2, default=str) + "\n")


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[str] = ()) -> Table:
    """A plain table. Cells are taken literally (texts may hold brackets), control characters shown as "�" (a patch file may hold a
    terminal's escapes), None is an empty cell; columns in `numbers` align right."""
    made = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        made.add_column(Text(heading), justify="right" if heading in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    return made


def printable(cell: Any) -> str:
    """A value as it may be shown on a terminal: control characters as "�", None as nothing."""
    return "" if cell is None else _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(cell))
