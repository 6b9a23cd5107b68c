"""The progress of a benchmark: one bar for its runs, one for the run in hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Steps:
    """Hears of runs (`begin`, `end`) and of what an editor reports (`report`); shows it, or does nothing."""

    def __init__(self, bar: Any = None, total: int = 0) -> None:
        self._bar = bar
        if bar is not None:
            self._all = bar.add_task("runs", total=total)
            self._one = bar.add_task("", total=None)

    def begin(self, what: str) -> None:
        """A run starts."""
        if self._bar is not None:
            self._bar.update(self._all, description=what)

    def report(self, stage: str, done: int, total: int) -> None:
        """What an editor is doing; the form `xpatch.edit(progress=...)` calls."""
        if self._bar is not None:
            self._bar.update(self._one, description=f"  {stage}", completed=done, total=total)

    def end(self) -> None:
        """A run is finished."""
        if self._bar is not None:
            self._bar.advance(self._all)


@contextmanager
def steps(progress: bool | None, total: int) -> Iterator[Steps]:
    """None: a bar when standard error is a terminal; True: always; False: nothing."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield Steps()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Steps(bar, total)
