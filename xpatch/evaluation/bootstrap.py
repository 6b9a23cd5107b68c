"""Shares with bootstrap intervals, resampled over clusters (subjects, edits), not over texts.

Texts about one subject, in several wordings or seeds, stand or fall together; resampling them one by one would make the
intervals too narrow. `G` clusters, `K` languages, `S` bootstrap rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

ROUNDS = 1000
LEVEL = 0.95


class Estimate(BaseModel):
    """A share between 0 and 1, its 95 % interval, the number of texts, and of clusters that were resampled."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float
    n: int
    clusters: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Tally:
    """Right answers and texts per cluster: names `[G]`, right `[G]` and count `[G]`, both float64."""

    clusters: tuple[str, ...]
    right: np.ndarray
    count: np.ndarray


def tally(clusters: Sequence[str], right: np.ndarray) -> Tally:
    """Count per cluster. clusters `[n]` names, right `[n]` bool -> names in order of first appearance."""
    position: dict[str, int] = {}
    rows = np.array([position.setdefault(name, len(position)) for name in clusters], dtype=np.int64)
    size = len(position)
    return Tally(
        tuple(position),
        np.bincount(rows, weights=right.astype(np.float64), minlength=size),
        np.bincount(rows, minlength=size).astype(np.float64),
    )


def merge(tallies: Sequence[Tally]) -> Tally:
    """One tally of all texts; a cluster that occurs in several (seeds, kinds) stays one cluster."""
    names = tuple(dict.fromkeys(name for one in tallies for name in one.clusters))
    right, count = _aligned(tallies, names)
    return Tally(names, right.sum(1), count.sum(1))


def estimate(tallies: Sequence[Tally], *, seed: int = 0, rounds: int = ROUNDS, level: float = LEVEL) -> Estimate:
    """The mean over K tallies (languages) of their shares, with its percentile bootstrap interval.

    A cluster is drawn for all K at once, since one edit's languages are not independent. Where every text agrees the bootstrap
    has no spread; the exact binomial bound over the clusters is given instead (for 100 clusters, all right: 96.4 to 100 %).
    """
    if not tallies:
        raise ValueError("an estimate needs at least one tally")
    names = tuple(dict.fromkeys(name for one in tallies for name in one.clusters))
    right, count = _aligned(tallies, names)
    value = float((right.sum(0) / count.sum(0)).mean())
    size, tail = len(names), (1 - level) / 2
    bound = tail ** (1 / size)
    if value in (0.0, 1.0):
        low, high = (0.0, 1 - bound) if value == 0 else (bound, 1.0)
    else:
        weights = _weights(size, seed, rounds)
        drawn = weights @ count
        with np.errstate(invalid="ignore"):
            shares = np.nanmean(np.where(drawn > 0, (weights @ right) / drawn, np.nan), axis=1)
        low, high = (float(x) for x in np.nanquantile(shares, (tail, 1 - tail)))
    return Estimate(value=value, low=low, high=high, n=int(count.sum()), clusters=size)


def _aligned(tallies: Sequence[Tally], names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Right and count as `[G, K]` on common cluster names; 0 where a tally lacks a cluster."""
    position = {name: row for row, name in enumerate(names)}
    right, count = np.zeros((2, len(position), len(tallies)))
    for column, one in enumerate(tallies):
        rows = [position[name] for name in one.clusters]
        right[rows, column], count[rows, column] = one.right, one.count
    return right, count


@functools.lru_cache(maxsize=8)
def _weights(size: int, seed: int, rounds: int) -> np.ndarray:
    """How often each of G clusters is drawn in each round: float32 `[S, G]`."""
    generator = np.random.default_rng(seed)
    weights = np.empty((rounds, size), dtype=np.float32)
    for start in range(0, rounds, 50):  # in blocks, so that many clusters need little memory
        block = min(50, rounds - start)
        drawn = generator.integers(0, size, (block, size)) + size * np.arange(block)[:, None]
        weights[start : start + block] = np.bincount(drawn.ravel(), minlength=block * size).reshape(block, size)
    weights.flags.writeable = False
    return weights
