"""The CUDA kernels against dense PyTorch and against the device's own copy: rows to commit once a GPU has measured them.

    python -m xpatch.benchmarks.kernel_cuda --json results/kernel_cuda.json

Axes: M rows, D width, N neurons. Keys and rows are random; the bias lets a chosen share of (row, neuron) pairs fire. Times are the
device's own (events), with its cache emptied before every call, sides in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xpatch.errors import BackendError
from xpatch.ops import native, patch_ffn

from . import machine

NEURONS, ROWS, WIDTHS = (1_000, 10_000, 50_000), (1, 8, 32, 64, 256), (768, 4096)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Of the (row, neuron) pairs, how many fire: what ReLU-gated patches show, what GELU patches show, and everything.
SHARES = {"sparse": 0.00066, "paper": 0.075, "adversarial": 1.0}
CACHE_BYTES = 256 * 2**20  # written before every call; more than any GPU's L2


def run(
    out: str | Path | None = None,
    *,
    n: Sequence[int] = NEURONS,
    m: Sequence[int] = ROWS,
    d: Sequence[int] = WIDTHS,
    dtypes: Sequence[str] = tuple(DTYPES),
    patches: Sequence[str] = ("sparse",),
    repeats: int = 25,
    seed: int = 0,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure every combination on the current CUDA device; written to `out` when it is given.

    Each row: n, m, d, dtype, patches, fires_share; dense_ms, kernel_ms, copy_ms (medians) with the distance between their quartiles;
    speedup (dense_ms / kernel_ms); key_bytes; copy_gb_s (bytes read and written by a copy of so many bytes), kernel_gb_s (key_bytes /
    kernel_ms), bandwidth_share (the two's ratio); max_rel_err (against float64, relative to the largest output).

    Raises `BackendError` without a CUDA device or without CUDA kernels in the native build, `ValueError` for fewer than 15 repeats.
    """
    if repeats < 15:
        raise ValueError(f"a median needs at least 15 repeats, found {repeats}")
    with _native_backend():
        torch.manual_seed(seed)
        flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
        rows = [
            _row(neurons, count, width, name, kind, repeats, flush)
            for kind in patches
            for name in dtypes
            for width in d
            for neurons in n
            for count in m
        ]
    result = {
        "benchmark": "kernel-cuda",
        "unit": "ms",
        "header": machine.header([seed], command),
        "cuda": {"torch": torch.version.cuda, "kernels": native.info().get("cuda_toolkit")},
        "rows": rows,
    }
    if out is not None:
        machine.write_json(result, Path(out))
    return result


@contextmanager
def _native_backend() -> Iterator[None]:
    """Within it CUDA tensors take the kernels; raises BackendError where they cannot."""
    if not torch.cuda.is_available():
        raise BackendError(
            "the CUDA kernels cannot be timed: expected a CUDA device that torch can use, found none; run this on a machine with a "
            "GPU and a build with XPATCH_CUDA=ON (`xpatch doctor` shows both)"
        )
    before = os.environ.get("XPATCH_BACKEND")
    os.environ["XPATCH_BACKEND"] = "native"
    native.reset()
    try:
        native.backend_for("cuda", torch.float32)  # raises where the build has no CUDA kernels
        yield
    finally:
        if before is None:
            del os.environ["XPATCH_BACKEND"]
        else:
            os.environ["XPATCH_BACKEND"] = before
        native.reset()


def _row(n: int, m: int, d: int, dtype: str, kind: str, repeats: int, flush: Tensor) -> dict[str, Any]:
    x, keys, bias, values = _patches(n, m, d, DTYPES[dtype], SHARES[kind])
    copied = torch.empty_like(keys)
    times = _measure(
        {
            "dense": lambda: torch.relu(F.linear(x, keys, bias)) @ values,
            "kernel": lambda: patch_ffn(x, keys, bias, values, "relu"),
            "copy": lambda: copied.copy_(keys),
        },
        repeats,
        flush,
    )
    scores = F.linear(x.double(), keys.double(), bias.double())
    expected = scores.relu() @ values.double()
    error = (patch_ffn(x, keys, bias, values, "relu").double() - expected).abs().max()
    key_bytes = keys.numel() * keys.element_size()
    copy_gb_s = 2 * key_bytes / times["copy_ms"] / 1e6
    kernel_gb_s = key_bytes / times["kernel_ms"] / 1e6
    return {
        "n": n,
        "m": m,
        "d": d,
        "dtype": dtype,
        "patches": kind,
        "fires_share": float((scores > 0).double().mean()),
        **times,
        "speedup": times["dense_ms"] / times["kernel_ms"],
        "key_bytes": key_bytes,
        "copy_gb_s": copy_gb_s,
        "kernel_gb_s": kernel_gb_s,
        "bandwidth_share": kernel_gb_s / copy_gb_s,
        "max_rel_err": float(error / expected.abs().max().clamp_min(1e-30)),
    }


def _patches(n: int, m: int, d: int, dtype: torch.dtype, share: float) -> tuple[Tensor, ...]:
    """x ``[M, D]``, unit keys ``[N, D]``, bias ``[N]`` at the quantile that lets `share` of the scores above zero, values ``[N, D]``."""
    x, values = (torch.randn(rows, d, device="cuda").to(dtype) for rows in (m, n))
    keys = F.normalize(torch.randn(n, d, device="cuda"), dim=1).to(dtype)
    # Scores of unit keys on standard normal rows are standard normal.
    quantile = torch.special.ndtri(torch.tensor(share, dtype=torch.float64)).clamp(-10, 10)
    bias = torch.full((n,), float(quantile), device="cuda", dtype=dtype)
    return x, keys, bias, values


def _measure(calls: dict[str, Callable[[], Any]], repeats: int, flush: Tensor) -> dict[str, float]:
    """name -> `<name>_ms` (median of the device time) and `<name>_iqr_ms`; the calls run in turn, every second round backwards."""
    for call in calls.values():
        for _ in range(3):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end))
    times: dict[str, float] = {}
    for name, values in found.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        times |= {f"{name}_ms": round(middle, 5), f"{name}_iqr_ms": round(high - low, 5)}
    return times


def main(words: Sequence[str] | None = None) -> None:
    """The command line: `--json FILE` and the grid's axes."""
    parser = argparse.ArgumentParser(
        prog="python -m xpatch.benchmarks.kernel_cuda", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", required=True, help="result file")
    parser.add_argument("--n", type=int, nargs="+", default=NEURONS, help="neurons")
    parser.add_argument("--m", type=int, nargs="+", default=ROWS, help="rows")
    parser.add_argument("--d", type=int, nargs="+", default=WIDTHS, help="widths")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=tuple(DTYPES))
    parser.add_argument("--patches", choices=SHARES, nargs="+", default=("sparse",), help="how many fire")
    parser.add_argument("--repeats", type=int, default=25)
    chosen = vars(parser.parse_args(words))
    run(chosen.pop("json"), **chosen)


if __name__ == "__main__":
    main()
