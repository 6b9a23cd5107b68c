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
import math
import weakref
from collections.abc import Iterable, Sequence
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

Counts = dict[str, np.ndarray]
"""language -> int64 `[N]`, or `[1]` for a gated delta."""


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
        self._tables: weakref.WeakKeyDictionary[PreparedPart, Counts] = weakref.WeakKeyDictionary()
        self.since = _now()

    def counts_on(self, device: torch.device) -> bool:
        """Whether calls on `device` are counted."""
        return not self.cpu_only or device.type == "cpu"

    def record(self, part: PreparedPart, fired: torch.Tensor, lead: Sequence[int], neurons: int, route: Route) -> None:
        """fired `[K, 2]` int64: the pairs (token, neuron) of the part that fired (neuron 0: where a delta's gate was open).

        lead: the axes that tokens are counted over, `(B, T)` or `(B·T,)`. neurons: how many the part has (1 for a delta). route: of
        the call. Tensors that only stand for others (while a model is traced) count nothing. On an accelerator this waits for it.
        """
        tokens = math.prod(lead)
        if type(fired) is not torch.Tensor or fired.is_meta or not tokens or not neurons:
            return
        items = lead[0]
        if len(lead) == 1 and route.batch and items % route.batch == 0:
            items = route.batch  # a model that flattens its tokens
        token, neuron = fired.cpu().numpy().T
        of_item = tokens // items
        if len(lead) == 2 and part.point.site in self.first_token:
            first = token % of_item == 0
            token, neuron = token[first], neuron[first]
        # An item counts once for a neuron, however many of its tokens made it fire.
        item, neuron = np.divmod(np.unique(token // of_item * neurons + neuron), neurons)
        languages, codes = _languages(route, items)
        with self._lock:
            table = self._tables.setdefault(part, {})
            for code, language in enumerate(languages):
                key = language if language in table or len(table) < LANGUAGES_AT_MOST else OTHERS
                counts = table.setdefault(key, np.zeros(neurons, dtype=np.int64))
                counts += np.bincount(neuron if codes is None else neuron[codes[item] == code], minlength=neurons)

    def total(self, part: PreparedPart) -> int:
        """(input, neuron) pairs, or inputs the gate of a delta opened for, in all languages."""
        return sum(int(row.sum()) for row in self.take([part])[0].values())

    def take(self, parts: Iterable[PreparedPart], *, reset: bool = False) -> list[Counts]:
        """The counts of each part at one moment, in their order; `reset` starts all parts again from zero at that moment."""
        with self._lock:
            tables = [{key: row.copy() for key, row in self._tables.get(part, {}).items()} for part in parts]
            if reset:
                self._tables = weakref.WeakKeyDictionary()
                self.since = _now()
        return tables

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            tables = [(part, {key: row.copy() for key, row in table.items()}) for part, table in self._tables.items()]
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


def _languages(route: Route, items: int) -> tuple[list[str], np.ndarray | None]:
    """The languages of a call, and for each of its inputs the index of its own; None where all have one language."""
    if route.languages is None or isinstance(route.languages, str):
        return [route.languages or UNKNOWN], None
    if items % len(route.languages):
        return [UNKNOWN], None
    each = items // len(route.languages)  # beams and returned sequences follow their row
    index: dict[str, int] = {}
    codes = [index.setdefault(language or UNKNOWN, len(index)) for language in route.languages for _ in range(each)]
    return list(index), np.array(codes) if len(index) > 1 else None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
