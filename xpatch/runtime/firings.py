"""Which edits fired: counts per neuron and language, kept while a model serves.

A neuron fires on a row (one token position of one input, padding included) where its score `x·key + bias` is above zero, whatever
its activation: a silent ReLU neuron adds nothing, a silent GELU or SiLU neuron next to nothing. Where a part has a gate, only rows
the gate lets through count; a gated delta, which has no neurons, counts those rows. A delta without a gate acts on every row, so
there is nothing to count. Replays of a captured CUDA graph run no Python and are not counted.
"""

from __future__ import annotations

import datetime
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from xpatch.patches.types import PatchNeurons
from xpatch.runtime.routing import Route
from xpatch.runtime.snapshot import PreparedPart

#: The language of rows whose call names none.
UNKNOWN = "?"
#: Where languages are counted beyond the first `LANGUAGES_AT_MOST` of a part: codes come from requests, memory is finite.
OTHERS = "others"
LANGUAGES_AT_MOST = 256
_AT_ONCE = 1 << 20  # (row, neuron) pairs looked at together

Counts = dict[str, np.ndarray]
"""language -> int64 `[N]`, or `[1]` for a gated delta."""
_Table = dict[tuple[str, torch.device], Any]


def countable(part: PreparedPart) -> bool:
    """Whether there is anything to count: not for a delta without a gate, which acts on every row."""
    return isinstance(part.part, PatchNeurons) or part.gate is not None


class Firings:
    """Counts since it was made. Any number of threads may record; what is kept does not grow with the number of calls.

    Counts belong to an applied part and go when nothing holds that part any more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: weakref.WeakKeyDictionary[PreparedPart, _Table] = weakref.WeakKeyDictionary()
        self.since = _now()

    def record(self, part: PreparedPart, fired: torch.Tensor, route: Route) -> None:
        """fired `[..., N]` bool: which of the part's neurons fired (`[..., 1]`: where its gate was open), for the rows of `route`.

        Tensors that only stand for others (while a model is traced) count nothing. On an accelerator nothing waits for the result.
        """
        if type(fired) is not torch.Tensor or fired.is_meta or not fired.numel():
            return
        languages, codes = _languages(route, fired)
        count = _count_on_cpu if fired.device.type == "cpu" else _count_on_device
        counts = count(fired, codes, len(languages))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            table = self._tables.setdefault(part, {})
            for language, row in zip(languages, counts, strict=True):
                known = (language, fired.device) in table or len(table) < LANGUAGES_AT_MOST
                key = (language if known else OTHERS, fired.device)
                if key in table:
                    table[key] += row
                else:
                    table[key] = row.copy() if isinstance(row, np.ndarray) else row.clone()

    def total(self, part: PreparedPart) -> int:
        """(row, neuron) pairs above zero, or rows the gate of a delta let through, in all languages."""
        return sum(int(row.sum()) for row in self.take([part])[0].values())

    def take(self, parts: Iterable[PreparedPart], *, reset: bool = False) -> list[Counts]:
        """The counts of each part at one moment, in their order; `reset` starts all parts again from zero at that moment."""
        with self._lock:
            tables = [{key: _copy(row) for key, row in self._tables.get(part, {}).items()} for part in parts]
            if reset:
                self._tables = weakref.WeakKeyDictionary()
                self.since = _now()
        return [_on_cpu(table) for table in tables]

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            tables = [(part, {key: _copy(row) for key, row in table.items()}) for part, table in self._tables.items()]
        return {"tables": tables, "since": self.since}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self._tables = weakref.WeakKeyDictionary(dict(state["tables"]))
        self.since = state["since"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Firings:
        copied = Firings.__new__(Firings)
        copied.__setstate__(self.__getstate__())  # the parts themselves are shared, as the snapshot is
        return copied


def _languages(route: Route, fired: torch.Tensor) -> tuple[list[str], list[int] | None]:
    """The languages of a call, and for each batch row the index of its own; None where all rows have one language."""
    if route.languages is None or isinstance(route.languages, str):
        return [route.languages or UNKNOWN], None
    rows = fired.numel() // fired.shape[-1]
    if rows % len(route.languages):
        return [UNKNOWN], None
    index: dict[str, int] = {}
    codes = [index.setdefault(language or UNKNOWN, len(index)) for language in route.languages]
    return list(index), codes if len(index) > 1 else None


def _count_on_cpu(fired: torch.Tensor, codes: list[int] | None, languages: int) -> np.ndarray:
    """`[languages, N]` int64. Neurons seldom fire: finding the few that did is several times quicker than a sum over the rows."""
    table = fired.reshape(-1, fired.shape[-1]).numpy()
    rows, neurons = table.shape
    counts = np.zeros(languages * neurons, dtype=np.int64)
    of_row = None if codes is None else np.repeat(np.array(codes), rows // len(codes)) * neurons
    step = max(1, _AT_ONCE // neurons)
    for start in range(0, rows, step):
        row, neuron = np.divmod(np.flatnonzero(table[start : start + step]), neurons)
        where = neuron if of_row is None else of_row[start + row] + neuron
        counts += np.bincount(where, minlength=counts.size)
    return counts.reshape(languages, neurons)


def _count_on_device(fired: torch.Tensor, codes: list[int] | None, languages: int) -> torch.Tensor:
    groups = 1 if codes is None else len(codes)
    by_item = fired.reshape(groups, -1, fired.shape[-1]).sum(1)
    if codes is None:
        return by_item
    counts = by_item.new_zeros(languages, fired.shape[-1])
    return counts.index_add_(0, torch.tensor(codes, device=fired.device), by_item)


def _copy(row: Any) -> Any:
    return row.copy() if isinstance(row, np.ndarray) else row.clone()


def _on_cpu(table: Mapping[tuple[str, torch.device], Any]) -> Counts:
    counts: Counts = {}
    for (language, _), row in table.items():
        plain = row if isinstance(row, np.ndarray) else row.cpu().numpy()
        counts[language] = counts[language] + plain if language in counts else plain
    return counts


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
