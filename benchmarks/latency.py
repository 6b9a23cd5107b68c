"""Latency of several ways to do one thing, measured in turn so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

MOST = 201  # repeats; enough for any median


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
    calls: Mapping[str, Callable[[], Any]], repeats: int | None = None, budget_s: float = 1.5
) -> tuple[dict[str, dict[str, float]], int, dict[str, Any]]:
    """`measure` with as many repeats as fit into `budget_s`, 15 to `MOST`, where `repeats` does not say; how many they were; and
    what each call returned at first.

    A round before sets the number and warms what is warm in use; quick calls get another one.
    """
    start = time.perf_counter()
    first = {name: call() for name, call in calls.items()}
    took = time.perf_counter() - start
    if took < budget_s / 15:
        start = time.perf_counter()
        for call in calls.values():
            call()
        took = time.perf_counter() - start
    if repeats is None:
        repeats = max(15, min(MOST, int(budget_s / took)))
    return measure(calls, repeats, warmup=0), repeats, first


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"p50_ms": round(middle, 4), "iqr_ms": round(high - low, 4)}
