"""Latency of several ways to do one thing, measured in turn so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def measure(calls: Mapping[str, Callable[[], Any]], repeats: int = 15, warmup: int = 3) -> dict[str, dict[str, float]]:
    """name -> {"p50_ms", "iqr_ms"}: the median wall time of each call, and the distance between its quartiles.

    The calls run interleaved: A B C, A B C, …; every second round in reverse order. At least 15 repeats.
    """
    if repeats < 15:
        raise ValueError(f"a median needs at least 15 repeats, found {repeats}")
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for round_ in range(repeats):
        for name in names if round_ % 2 == 0 else reversed(names):
            start = time.perf_counter()
            calls[name]()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: _summary(values) for name, values in times.items()}


def measured(
    calls: Mapping[str, Callable[[], Any]], repeats: int | None = None, budget_s: float = 1.5, most: int = 201
) -> tuple[dict[str, dict[str, float]], int]:
    """`measure` with as many repeats as fit into `budget_s`, 15 to `most`, where `repeats` does not say; and how many they were."""
    for call in calls.values():
        call()
    start = time.perf_counter()
    if repeats is None:
        for call in calls.values():
            call()
        repeats = max(15, min(most, int(budget_s / (time.perf_counter() - start))))
    return measure(calls, repeats, warmup=1 if repeats > 15 else 0), repeats


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"p50_ms": round(middle, 4), "iqr_ms": round(high - low, 4)}
