"""One point of the kernel benchmark: the same patches through dense PyTorch, through `xpatch.ops.patch_ffn`, and a plain read.

Axes: M rows, D width, N neurons.
"""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xpatch import ops
from xpatch.ops import native

from .latency import measured

TIMED_ROWS, MOST_WINDOWS = 128, 16
CHUNK = 16384  # neurons at a time in float64


@dataclass(frozen=True)
class Loaded:
    """Patches ready to be timed. x, y `[R, D]`: rows at the FFN's input and the FFN's own output; memory `[R', D]`: rows that the keys
    are packed for; keys, values `[N, D]`; bias `[N]`; packed: what `xpatch.ops.pack_keys` made of the keys, None where it cannot."""

    x: Tensor
    y: Tensor
    memory: Tensor
    keys: Tensor
    bias: Tensor
    values: Tensor
    activation: str
    packed: Tensor | None


def load(case: Any, dtype: torch.dtype) -> Loaded:
    """A case of `xpatch.benchmarks.trained` in `dtype`, its keys packed for rows like the memory's."""
    x, keys, bias, values = (tensor.to(dtype) for tensor in (case.x, case.keys, case.bias, case.values))
    packed = ops.pack_keys(keys, bias, case.activation, case.memory)
    return Loaded(x, case.y, case.memory, keys, bias, values, case.activation, packed)


def dense(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> Tensor:
    """What a PyTorch user would write for the patches: two matmuls and an activation."""
    return ops.activate(F.linear(x, keys, bias), activation) @ values


def kernel(patches: Loaded) -> ops.BoundPatchFfn:
    """The operator on packed keys, as a served model calls it."""
    return ops.BoundPatchFfn(patches.keys, patches.bias, patches.values, patches.activation, patches.packed)


@torch.no_grad()
def point(patches: Loaded, rows: int, repeats: int | None = None) -> dict[str, Any]:
    """Times and errors with M = `rows` rows a call, on torch's present threads, as JSON values.

    Small calls take the next M rows each time, the same on both sides, so that no single row decides. repeats: of every side;
    None: 15, and more where the calls are short.
    """
    count = max(1, min(MOST_WINDOWS, TIMED_ROWS // rows, patches.x.shape[0] // rows))
    windows = list(patches.x[: count * rows].split(rows))
    weights = (patches.keys, patches.bias, patches.values, patches.activation)
    calls = {
        "dense": _over(windows, lambda x: dense(x, *weights)),
        "kernel": _over(windows, kernel(patches)),
        **plain_reads(patches.keys.numel()),
    }
    times, repeats, _ = measured(calls, repeats)
    x, y = patches.x[: count * rows], patches.y[: count * rows]
    return {
        **_times(times, patches.keys.numel()),
        "repeats": repeats,
        **_errors(x, y, patches),
        **_screening(x, patches, rows),
    }


def once_ms(call: Callable[[], Any]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    call()
    return round(1000 * (time.perf_counter() - start), 4)


def plain_reads(count: int) -> dict[str, Callable[[], Any]]:
    """Reads of `count` bytes, as many as the int8 keys have, by torch's threads: a vectorised sum, and BLAS' dot product.

    They have their own buffer, in large pages as packed keys are: the sides would otherwise warm the caches for one another.
    """
    buffer = _in_large_pages(max(1, count // 4)).fill_(1.0)
    half = max(1, buffer.numel() // 2)
    return {"sum": buffer.sum, "dot": lambda: torch.dot(buffer[:half], buffer[-half:])}


def _in_large_pages(count: int) -> Tensor:
    """`[count]` fp32, uninitialised, in 2 MB pages where the system grants them."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, max(4 * count, mmap.PAGESIZE), **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=count)


def int8_peak_share(multiply_adds: float, kernel_ms: float, threads: int) -> float | None:
    """The kernel's int8 multiply-adds a second over the machine's int8 dot-product peak, measured now; None without a native build."""
    if not native.available():
        return None
    peak: float = native.load().int8_peak(threads)
    return round(multiply_adds / (kernel_ms / 1000) / peak, 4) if peak else None


def _over(windows: list[Tensor], call: Callable[[Tensor], Any]) -> Callable[[], Any]:
    turn = itertools.cycle(windows)
    return lambda: call(next(turn))


def _times(times: dict[str, dict[str, float]], key_bytes: int) -> dict[str, Any]:
    read = min(("sum", "dot"), key=lambda name: times[name]["p50_ms"])
    dense_ms, kernel_ms, floor_ms = (times[name]["p50_ms"] for name in ("dense", "kernel", read))
    return {
        "dense_ms": dense_ms,
        "dense_iqr_ms": times["dense"]["iqr_ms"],
        "kernel_ms": kernel_ms,
        "kernel_iqr_ms": times["kernel"]["iqr_ms"],
        "speedup": round(dense_ms / kernel_ms, 3),
        "floor_ms": floor_ms,
        "floor_iqr_ms": times[read]["iqr_ms"],
        "floor_ratio": round(kernel_ms / floor_ms, 3),
        "floor_read": read,
        "floor_gb_s": round(key_bytes / floor_ms / 1e6, 2),
    }


def _errors(x: Tensor, y: Tensor, patches: Loaded) -> dict[str, Any]:
    """The largest deviation of both sides from float64, over the largest norm of a row of FFN output + patch; and what fired."""
    exact, fired = reference(x, patches)
    scale = float(torch.linalg.vector_norm(y.double() + exact, dim=1).max()) or 1.0
    found = {
        "max_rel_err": kernel(patches)(x),
        "dense_rel_err": dense(x, patches.keys, patches.bias, patches.values, patches.activation),
    }
    errors = {name: float(f"{float((out.double() - exact).abs().max()) / scale:.3g}") for name, out in found.items()}
    return {**errors, "fired_share": float(f"{fired:.4g}")}


def reference(x: Tensor, patches: Loaded) -> tuple[Tensor, float]:
    """`[M, D]` in float64 from the patches as they are given, and the share of (row, neuron) pairs above zero."""
    wide, fired = x.double(), 0
    out = torch.zeros(x.shape[0], patches.values.shape[1], dtype=torch.float64)
    parts = (tensor.split(CHUNK) for tensor in (patches.keys, patches.bias, patches.values))
    for keys, bias, values in zip(*parts, strict=True):
        scores = F.linear(wide, keys.double(), bias.double())
        fired += int((scores > 0).sum())
        out += ops.activate(scores, patches.activation) @ values.double()
    return out, fired / max(1, x.shape[0] * patches.keys.shape[0])


def _screening(x: Tensor, patches: Loaded, rows: int) -> dict[str, Any]:
    """The share of pairs that survive the screening, and whether a call went the dense way; None where nothing is screened."""
    if patches.packed is None:
        return {"survivors_share": None, "dense_path": None}
    given = (patches.keys, patches.bias, patches.packed, patches.activation)
    found = [ops.screening_stats(window, *given) for window in x.split(rows)]
    share = sum(stats["survivors"] for stats in found) / max(1, sum(stats["pairs"] for stats in found))
    return {"survivors_share": float(f"{share:.4g}"), "dense_path": any(stats["dense"] for stats in found)}
