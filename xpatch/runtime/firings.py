"""Which edits fired: counts of neurons above zero, kept while a model serves."""

from __future__ import annotations

import threading
from typing import Any

import torch

from xpatch.runtime.routing import Route
from xpatch.runtime.snapshot import PreparedPart


class Firings:
    """Counts since it was made. Any number of threads may record."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], torch.Tensor] = {}

    def record(self, part: PreparedPart, positive: torch.Tensor, route: Route) -> None:
        """positive `[..., N]`: which of the part's neurons are above zero, for the rows of `route`."""
        number, key = positive.sum(), (part.set_name, part.name)
        with self._lock:
            self._counts[key] = self._counts[key] + number if key in self._counts else number

    def total(self, part: PreparedPart) -> int:
        """(row, neuron) pairs above zero."""
        count = self._counts.get((part.set_name, part.name))
        return 0 if count is None else int(count)

    def __getstate__(self) -> dict[str, Any]:
        return {"_counts": dict(self._counts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self._counts = state["_counts"]
