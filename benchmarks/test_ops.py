"""The operators that choose per row, each beside what it stands for: `make bench`. One thread, medians, D = 768.

lowrank: the deltas of one linear layer, rank 4, computed one after another on every row (as plainly as a server can do it), and
grouped by row; every row names one of eight deltas. ball: `torch.cdist`, and early abandoning; keys are normal, half of the rows lie
near a key, so radii of 3 are those of an editor that lets in what is near and nothing else, and at 25 a distance is given up late.
Compare within a group: absolute times are this machine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from xpatch.ops import ball, lowrank, reference

WIDTH = 768
RANK = 4
USED = 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def one_after_another(
    x: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]], rows: torch.Tensor
) -> torch.Tensor:
    """The deltas that some row names, each on all rows: x `[M, D]`, parts (down, up), rows `[M, G]` bool -> `[M, V]`."""
    total = x.new_zeros(x.shape[0], parts[0][1].shape[0])
    for index in rows.any(0).nonzero().flatten().tolist():
        down, up = parts[index]
        total = total + torch.where(rows[:, index, None], F.linear(F.linear(x, down), up), 0)
    return total


@pytest.mark.parametrize("how", ["loop", "grouped"])
@pytest.mark.parametrize("M", [8, 64, 1024])
@pytest.mark.parametrize("G", [10, 100])
def test_lowrank(benchmark: Any, G: int, M: int, how: str) -> None:
    benchmark.group = f"lowrank G={G} M={M}"
    parts = [(torch.randn(RANK, WIDTH) / WIDTH**0.5, torch.randn(WIDTH, RANK)) for _ in range(G)]
    down = torch.cat([down for down, _ in parts])
    up = torch.cat([up.t() for _, up in parts]).t()
    offsets = torch.arange(0, RANK * G + 1, RANK)
    x, rows = torch.randn(M, WIDTH), F.one_hot(torch.arange(M) % USED, G).bool()
    expected = one_after_another(x, parts, rows)
    if how == "loop":
        benchmark(one_after_another, x, parts, rows)
    else:
        torch.testing.assert_close(benchmark(lowrank, x, down, up, offsets, rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["cdist", "ball"])
@pytest.mark.parametrize("radius", [3.0, 25.0])
@pytest.mark.parametrize("M", [1, 32, 256])
@pytest.mark.parametrize("K", [1_000, 50_000])
def test_ball(benchmark: Any, K: int, M: int, radius: float, how: str) -> None:
    benchmark.group = f"ball K={K} M={M} radius={radius:g}"
    keys, radii = torch.randn(K, WIDTH), torch.full((K,), radius)
    x = torch.randn(M, WIDTH)
    near = x[1::2]
    near.copy_(keys[torch.randint(0, K, (near.shape[0],))] + 0.05 * torch.randn(near.shape))
    found = benchmark.pedantic(
        reference.ball if how == "cdist" else ball, (x, keys, radii), rounds=3, iterations=1, warmup_rounds=M < 32
    )
    assert found.tolist() == [row % 2 == 1 for row in range(M)]
