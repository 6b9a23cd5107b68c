"""Peak growth of this process's resident memory while something runs."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .soak import resident_bytes

EVERY = 0.02  # seconds between two looks


class Watch:
    """`peak_mb`: growth of the resident memory over where it began, in 10^6 bytes; None where the system does not tell.

    trace: (seconds, what `note` was last told, resident 10^6 bytes), at most one every `gap` seconds.
    """

    def __init__(self, gap: float) -> None:
        self._gap, self._noted = gap, 0
        self._begin, self._start = resident_bytes(), time.perf_counter()
        self._peak = self._begin or 0
        self.trace: list[tuple[float, int, float]] = []

    def note(self, number: int) -> None:
        """How far the work has come."""
        self._noted = number

    def look(self) -> None:
        """Read the size now."""
        size, now = resident_bytes() or 0, time.perf_counter() - self._start
        self._peak = max(self._peak, size)
        if not self.trace or now - self.trace[-1][0] >= self._gap:
            self.trace.append((round(now, 2), self._noted, round(size / 1e6, 1)))

    @property
    def peak_mb(self) -> float | None:
        return None if self._begin is None else round((self._peak - self._begin) / 1e6, 1)


@contextmanager
def watching(gap: float = 1.0) -> Iterator[Watch]:
    """Look every 20 ms until the block ends. Memory freed before is given back first, so that a later run does not live on it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another libc: the growth of a later run is a lower bound
    watch, stop = Watch(gap), threading.Event()

    def look() -> None:
        while not stop.wait(EVERY):
            watch.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()
        watch.look()
