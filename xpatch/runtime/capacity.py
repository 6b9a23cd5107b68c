"""Patches inside captured CUDA graphs: buffers of a fixed size, in two halves, swapped between replays.

A captured graph replays kernels on fixed addresses and runs no Python, so it cannot look a snapshot up. It reads buffers that
hold up to C neurons a site instead. `published [1]` says which half is current; the first thing a replay does is to copy it
(`latch`), so all its sites read one half. A writer fills the other half and then flips `published`: a replay sees the old patches
or the new ones, never both. `live [2]` of each site says how many neurons a half holds; those behind them, left from earlier swaps,
add nothing, whatever they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xpatch.errors import ConflictError, MismatchError
from xpatch.ops import canonical_activation, patch_ffn_capacity
from xpatch.patches.types import PatchNeurons
from xpatch.runtime.snapshot import Point, Snapshot, compute_dtype

if TYPE_CHECKING:
    from xpatch.runtime.routing import Rows

_here = threading.local()


@contextmanager
def capture() -> Iterator[None]:
    """Within this context (this thread) model calls read the capacity buffers, as they do while a CUDA graph is captured."""
    before = getattr(_here, "on", False)
    _here.on = True
    try:
        yield
    finally:
        _here.on = before


def is_capturing() -> bool:
    """Whether this thread's kernels are being captured into a graph."""
    if getattr(_here, "on", False):
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Capacity:
    """Room for `neurons` patch neurons of one activation at each site (point.site -> buffers on the site's device).

    Per site keys `[2, C, D]`, bias `[2, C]`, values `[2, C, D]` in the dtype patches are computed in, and live `[2]`, the neurons in
    use in each half. Raises `ConflictError` for sites on several devices, `MismatchError` for a size below 1 or no site.
    """

    def __init__(
        self, model: nn.Module, points: Mapping[str, Point], widths: Mapping[str, int], neurons: int, activation: str
    ) -> None:
        if isinstance(neurons, bool) or not isinstance(neurons, int) or neurons < 1:
            raise MismatchError(
                f"prepare(capacity=...): expected at least 1 neuron, found {neurons!r}; give a whole number"
            )
        if not points:
            raise MismatchError(
                "prepare(capacity=...): expected at least one FFN among the sites, found none; the buffers for captured graphs hold patch "
                "neurons, which stand beside FFNs: name one, or leave the capacity out"
            )
        self.neurons = neurons
        self.activation = canonical_activation(activation)
        self.buffers: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.live: dict[str, torch.Tensor] = {}
        devices = set()
        with torch.inference_mode(False):
            for site, point in points.items():
                weight = next(model.get_submodule(point.adds).parameters())
                if weight.is_meta:
                    raise ConflictError(
                        f"prepare(capacity=...): the weights at {site!r} are not in memory (offloaded), and a captured graph cannot load "
                        "them; keep this layer on the device, or serve without capture"
                    )
                devices.add(weight.device)
                keys = torch.zeros(2, neurons, widths[site], device=weight.device, dtype=compute_dtype(weight.dtype))
                self.buffers[site] = (keys, keys.new_zeros(2, neurons), torch.zeros_like(keys))
                self.live[site] = torch.zeros(2, dtype=torch.int64, device=weight.device)
            if len(devices) > 1:
                raise ConflictError(
                    f"prepare(capacity=...): one captured graph runs on one device; found sites on {', '.join(map(str, devices))}"
                )
            self.published = torch.zeros(1, dtype=torch.int64, device=devices.pop())
        self._half = 0

    @staticmethod
    def latched(capacity: Capacity | None, snapshot: Snapshot, rows: Rows | None) -> torch.Tensor | None:
        """The epoch `[1]` for a call under capture. Raises `ConflictError` where a replay could not follow later swaps."""
        if capacity is None:
            if snapshot.sets:
                raise ConflictError(
                    "a model with patches is being captured into a CUDA graph, whose replays would not see later swaps; call "
                    "xpatch.prepare(model, capacity=N) before the capture, or capture with `with xpatch.disabled(model)`"
                )
            return None
        if rows is not None:
            raise ConflictError(
                "a row choice (Rows) cannot be captured into a CUDA graph: every replay would use the same one; capture without it "
                "and call the model plainly for batches that need a choice"
            )
        return capacity.published.clone()

    def write(self, snapshot: Snapshot) -> None:
        """Fill the half that is not current with the snapshot's neurons, then make it current.

        Raises `ConflictError`, changing nothing, for parts that do not fit: other sites, forms or activations, gates, masks, or
        more neurons than there is room for.
        """
        wanted = {site: self._rows(snapshot, site) for site in snapshot.at}
        half = 1 - self._half
        self._wait()  # for replays that began two swaps ago and may still read this half
        with torch.inference_mode(False), torch.no_grad():
            for site, buffers in self.buffers.items():
                rows = wanted.get(site, {})
                for buffer, name in zip(buffers, ("keys", "bias", "values"), strict=True):
                    if rows:
                        buffer[half, : rows[name].shape[0]].copy_(rows[name])
                self.live[site][half].fill_(rows["bias"].shape[0] if rows else 0)
            self._wait()
            self.published.fill_(half)
        self._wait()
        self._half = half

    def add(self, site: str, x: torch.Tensor, y: torch.Tensor, epoch: torch.Tensor) -> torch.Tensor | None:
        """`y + act(x Kᵀ + b) V` with the half that `epoch` names; None where the site has no buffers."""
        if site not in self.buffers:
            return None
        keys, bias, values = self.buffers[site]
        return patch_ffn_capacity(x.to(keys.dtype), keys, bias, values, self.live[site], epoch, self.activation, y)

    def _rows(self, snapshot: Snapshot, site: str) -> dict[str, torch.Tensor]:
        if site not in self.buffers:
            raise ConflictError(
                f"patch set with a part at {site!r}: the model was prepared for captured graphs with room at {sorted(self.buffers)} "
                "only; prepare it again with this site, and capture again"
            )
        parts = []
        for prepared in snapshot.at[site]:
            part = prepared.part
            plain = isinstance(part, PatchNeurons) and part.activation == self.activation
            if not plain or prepared.gate is not None or prepared.languages is not None:
                raise ConflictError(
                    f"patch set {prepared.set_name!r}, part {prepared.name!r} at {site!r}: the buffers for captured graphs hold "
                    f"{self.activation} neurons without gates and masks; found {_description(prepared)}. Serve it without capture"
                )
            parts.append(part)
        rows: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "bias", "values")
        }
        if rows["bias"].shape[0] > self.neurons:
            raise ConflictError(
                f"{rows['bias'].shape[0]} patch neurons at {site!r}, but the model was prepared with room for {self.neurons}; prepare it "
                "with a larger capacity and capture again"
            )
        return rows

    def _wait(self) -> None:
        if self.published.device.type == "cuda":
            torch.cuda.synchronize(self.published.device)


def _description(prepared: Any) -> str:
    words = [getattr(prepared.part, "activation", prepared.part.form)]
    words += ["a gate"] if prepared.gate is not None else []
    words += ["a language mask"] if prepared.languages is not None else []
    return " with ".join(words)
