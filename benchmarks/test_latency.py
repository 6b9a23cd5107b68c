"""A small patched classifier for pytest-benchmark, held against its unpatched self and the committed baseline (`make bench`)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from xpatch.benchmarks import baseline


@pytest.mark.parametrize("case", baseline.LATENCY_CASES)
def test_latency(benchmark: Any, case: str) -> None:
    calls = baseline.latency_calls(*baseline.LATENCY_CASES[case])
    with torch.no_grad():
        benchmark(calls["patched"])
    measure = functools.partial(baseline.ratio, calls, "patched", "unpatched")
    benchmark.extra_info["ratio_to_unpatched"] = baseline.check(case, "latency", measure, baseline.read())
