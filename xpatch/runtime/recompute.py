"""Gradient checkpointing: a layer that is computed again in the backward pass sees the call it was first computed in.

By then that call has ended, another snapshot may be published, and the rows' languages are gone. The layer's input is what both
computations share: `torch.utils.checkpoint` keeps it (or a detached view of the same storage).
"""

from __future__ import annotations

from typing import Any

import torch

from xpatch.runtime.calls import Call

_PURGE_AT = 64


class Recall:
    """Storage of a layer's input -> the call that computed the layer, for as long as that storage lives."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[Any, Call]] = {}
        self._purge_at = _PURGE_AT

    def remember(self, x: torch.Tensor, call: Call) -> None:
        """`x` entered a layer during `call`."""
        from torch.multiprocessing.reductions import StorageWeakRef

        reference = StorageWeakRef(x.untyped_storage())
        self._calls[reference.cdata] = (reference, call)
        if len(self._calls) >= self._purge_at:
            self._purge()
            self._purge_at = 2 * len(self._calls) + _PURGE_AT

    def find(self, x: torch.Tensor) -> Call | None:
        """The call in which `x` entered a layer before."""
        found = self._calls.get(x.untyped_storage()._cdata)
        return found[1] if found is not None and not found[0].expired() else None

    def __bool__(self) -> bool:
        """Whether some layer may still be computed again."""
        if self._calls:
            self._purge()
        return bool(self._calls)

    def _purge(self) -> None:
        for key, (reference, _) in list(self._calls.items()):
            if reference.expired():
                self._calls.pop(key, None)
