"""How long is left: a rich bar on a terminal, a callable of the caller's, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int], None]
"""`report(stage, done, total)`: stage "reading" counts texts, "training" counts edits."""


@contextmanager
def reporting(progress: bool | Report | None) -> Iterator[Report]:
    """The report function for one edit call.

    None: a bar when standard error is a terminal; True: always a bar; False: nothing; a callable is called as it is.
    """
    if callable(progress):
        yield progress
    elif progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda stage, done, total: None
    else:
        yield from _bar()


def _bar() -> Iterator[Report]:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:  # the bar is a comfort, not a need
        yield lambda stage, done, total: None
        return
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, int] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield report
