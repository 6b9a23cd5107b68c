"""Which edits fired: counts per neuron and language, kept while a model serves.

What is counted are inputs, the rows of a call's batch (`generate` makes one call per token). A neuron fired on an input where its
score `x·key + bias` was above zero at one of the input's tokens, whatever its activation: a silent ReLU neuron adds nothing, a
silent GELU or SiLU neuron next to nothing. At the final FFN of a classifier that reads its first token, only that token counts:
at the others neurons fire at random and reach no answer. Elsewhere every token does, padding too.

Where a part has a gate, only tokens the gate lets through count; a gated delta, which has no neurons, counts the inputs its gate
opened for. A delta without a gate acts on every input, so there is nothing to count. Replays of a captured CUDA graph run no
Python and are not counted.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.heads import head_of
from xpatch.patches.locks import new_lock
from xpatch.patches.types import PatchNeurons
from xpatch.runtime.routing import Route
from xpatch.runtime.snapshot import PreparedPart

#: The language of rows whose call names none.
UNKNOWN = "?"
#: Where languages are counted beyond the first `LANGUAGES_AT_MOST` of a part: codes come from requests, memory is finite.
OTHERS = "others"
LANGUAGES_AT_MOST = 256
_AT_ONCE = 1 << 20  # (token, neuron) pairs looked at together

Counts = dict[str, np.ndarray]
"""language -> int64 `[N]`, or `[1]` for a gated delta."""
_Table = dict[tuple[str, torch.device], Any]


def countable(part: PreparedPart) -> bool:
    """Whether there is anything to count: not for a delta without a gate, which acts on every row."""
    return isinstance(part.part, PatchNeurons) or part.gate is not None


class Firings:
    """Counts since it was made. Any number of threads may record; what is kept does not grow with the number of calls.

    Counts belong to an applied part and go when nothing holds that part any more. cpu_only: count where it was measured to cost
    less than 1 % of a call (benchmarks/firings.py), and leave calls on accelerators alone. first_token: names of sites where only
    the first token counts; see `first_token_sites`.
    """

    def __init__(self, *, cpu_only: bool = False, first_token: frozenset[str] = frozenset()) -> None:
        self.cpu_only = cpu_only
        self.first_token = first_token
        self._lock = new_lock()
        self._tables: weakref.WeakKeyDictionary[PreparedPart, _Table] = weakref.WeakKeyDictionary()
        self.since = _now()

    def counts_on(self, device: torch.device) -> bool:
        """Whether calls on `device` are counted."""
        return not self.cpu_only or device.type == "cpu"

    def record(self, part: PreparedPart, fired: torch.Tensor, route: Route) -> None:
        """fired `[B, T, N]` (or `[B·T, N]`) bool: which of the part's neurons fired (N = 1: where its gate was open).

        route: of the call. Tensors that only stand for others (while a model is traced) count nothing. On an accelerator nothing
        waits for the result.
        """
        if type(fired) is not torch.Tensor or fired.is_meta or not fired.numel():
            return
        if fired.ndim == 3 and part.point.site in self.first_token:
            fired = fired[:, :1]
        items = fired.shape[0]
        if fired.ndim == 2 and route.batch and items % route.batch == 0:
            items = route.batch  # a model that flattens its tokens
        languages, codes = _languages(route, items)
        count = _count_on_cpu if fired.device.type == "cpu" else _count_on_device
        counts = count(fired.reshape(items, -1, fired.shape[-1]), codes, len(languages))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            table = self._tables.setdefault(part, {})
            for language, row in zip(languages, counts, strict=True):
                known = (language, fired.device) in table or len(table) < LANGUAGES_AT_MOST
                key = (language if known else OTHERS, fired.device)
                if key in table:
                    table[key] += row
                else:
                    table[key] = _copy(row)

    def total(self, part: PreparedPart) -> int:
        """(input, neuron) pairs, or inputs the gate of a delta opened for, in all languages."""
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
        kept = {key: vars(self)[key] for key in ("since", "cpu_only", "first_token")}
        return {"tables": tables, **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock = new_lock()
        self._tables = weakref.WeakKeyDictionary(dict(state["tables"]))
        vars(self).update({key: value for key, value in state.items() if key != "tables"})

    def __deepcopy__(self, memo: dict[int, Any]) -> Firings:
        copied = Firings.__new__(Firings)
        copied.__setstate__(self.__getstate__())  # the parts themselves are shared, as the snapshot is
        return copied


def first_token_sites(model: nn.Module) -> frozenset[str]:
    """The site names at the final FFN of a classifier whose head reads the first token; none for any other model."""
    try:
        head = head_of(model)
    except MismatchError:
        return frozenset()
    return frozenset((head.site.name, head.site.up, head.site.down)) if head.reads == "first" else frozenset()


def _languages(route: Route, items: int) -> tuple[list[str], list[int] | None]:
    """The languages of a call, and for each of its inputs the index of its own; None where all have one language."""
    if route.languages is None or isinstance(route.languages, str):
        return [route.languages or UNKNOWN], None
    if items % len(route.languages):
        return [UNKNOWN], None
    each = items // len(route.languages)  # beams and returned sequences follow their row
    index: dict[str, int] = {}
    codes = [index.setdefault(language or UNKNOWN, len(index)) for language in route.languages for _ in range(each)]
    return list(index), codes if len(index) > 1 else None


def _count_on_cpu(fired: torch.Tensor, codes: list[int] | None, languages: int) -> np.ndarray:
    """fired `[B, T, N]` -> `[languages, N]` int64. Neurons seldom fire: finding those that did is quicker than any sum."""
    items, tokens, neurons = fired.shape
    counts = np.zeros((languages, neurons), dtype=np.int64)
    of_item = np.zeros(items, dtype=np.int64) if codes is None else np.array(codes)
    step = max(1, _AT_ONCE // (tokens * neurons))
    for start in range(0, items, step):
        some = fired[start : start + step].numpy()
        token, neuron = np.divmod(np.flatnonzero(some), neurons)
        seen = np.bincount(token // tokens * neurons + neuron, minlength=len(some) * neurons) > 0
        item, neuron = np.divmod(np.flatnonzero(seen), neurons)
        where = of_item[start + item] * neurons + neuron
        counts += np.bincount(where, minlength=counts.size).reshape(counts.shape)
    return counts


def _count_on_device(fired: torch.Tensor, codes: list[int] | None, languages: int) -> torch.Tensor:
    by_item = fired.any(1)
    if codes is None:
        return by_item.sum(0, keepdim=True)
    counts = torch.zeros(languages, fired.shape[-1], dtype=torch.int64, device=fired.device)
    return counts.index_add_(0, torch.tensor(codes, device=fired.device), by_item.long())


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
