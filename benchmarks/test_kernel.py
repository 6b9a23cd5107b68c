"""The kernel's small cases for pytest-benchmark, each held against dense PyTorch and the committed baseline (`make bench`)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from xpatch.benchmarks import baseline


@pytest.mark.parametrize("case", baseline.KERNEL_CASES)
def test_kernel(benchmark: Any, case: str) -> None:
    kind, rows = baseline.KERNEL_CASES[case]
    calls = baseline.kernel_calls(baseline.patches(kind), rows)
    with torch.no_grad():
        benchmark(calls["kernel"])
    measure = functools.partial(baseline.ratio, calls, "kernel", "dense")
    benchmark.extra_info["ratio_to_dense"] = baseline.check(case, "kernel", measure, baseline.read())
