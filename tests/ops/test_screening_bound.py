"""The bound of the screening: no neuron that may fire is passed over, where its errors line up and where they are largest."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.screening import CUTS, activations, assert_bound_holds, assert_exact, biases_around, draw, seeds


def unrotate(v):
    """The inverse of the kernel's rotation, in float64: rows of v `[..., D]` are what the kernel should see."""
    v = np.array(v, dtype=np.float64)
    D = v.shape[-1]
    size = 256 if D >= 256 else 64 if D >= 64 else 16
    blocks = [slice(i, i + size) for i in range(0, D - size + 1, size)]
    if D > size and D % size:
        blocks.append(slice(D - size, D))
    for block in reversed(blocks if D >= size else []):
        half = 1
        while half < size:
            pairs = v[..., block].reshape(*v.shape[:-1], -1, 2, half)
            a, b = pairs[..., 0, :].copy(), pairs[..., 1, :].copy()
            v[..., block] = np.stack([a + b, a - b], -2).reshape(*v.shape[:-1], size)
            half *= 2
        v[..., block] /= math.sqrt(size)
    spread = (np.arange(D, dtype=np.uint64) * 0x9E3779B1) & 0xFFFFFFFF
    spread = ((spread ^ (spread >> np.uint64(15))) * 0x85EBCA77) & 0xFFFFFFFF
    return np.where(spread >> np.uint64(31), -v, v)


@settings(max_examples=150)
@given(
    D=st.sampled_from([1, 2, 7, 15, 16, 40, 64, 100, 256, 300, 769]),
    activation=activations,
    size=st.integers(-12, 12),
    seed=seeds,
)
def test_the_bound_holds_where_its_errors_line_up(D, activation, size, seed):
    """Cauchy-Schwarz with equality: the key is flat after the rotation and the row its opposite, so that both rounding errors
    point along the other side, and nothing is left but the allowance for fp32 rounding."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], D)
    key = torch.from_numpy(unrotate(signs)).float() * 2.0**size
    row = torch.from_numpy(unrotate(-signs)).float() * 2.0 ** (seed % 7 - 3)
    bias = biases_around(row, key, CUTS[activation], 40)
    kept = assert_bound_holds(row, key.repeat(len(bias), 1), bias, activation)
    assert kept[:81].any()
    # And it is tight: what is far below the cut-off by more than rounding is passed over.
    below = bias.double() + key.double() @ row.double() - CUTS[activation]
    rounding = (3 * D + 600) * 2.0**-24 * float(key.double().norm() * row.double().norm()) + (
        D + 200
    ) * 2.0**-24 * bias.abs()
    assert not kept[(below < -rounding) & (below < -1e-4 * abs(CUTS[activation]))].any()


@settings(max_examples=150)
@given(D=st.sampled_from([15, 16, 64, 100, 256, 769]), activation=activations, swap=st.booleans(), seed=seeds)
def test_the_bound_holds_for_the_largest_rounding_errors(D, activation, swap, seed):
    """One side is flat after the rotation; each coordinate of the other but the largest lies just beside the middle of two bytes,
    so that all its errors point along the first. A bound that is one per cent too small fails."""
    random = np.random.default_rng(seed)
    signs = random.choice([-1.0, 1.0], D)
    between = -(random.integers(10, 60) - 0.4999) * signs
    between[0] = 126.9 * -signs[0]
    row, key = (torch.from_numpy(unrotate(v)).float() for v in ((signs, between) if swap else (between, signs)))
    bias = biases_around(row, key, CUTS[activation], 40)
    assert_bound_holds(row, key.repeat(len(bias), 1), bias, activation)


@settings(max_examples=150)
@given(
    D=st.integers(1, 400), activation=activations, row_size=st.integers(-36, 50), key_size=st.integers(-36, 50), seed=seeds,
    heavy=st.booleans(),
)  # fmt: skip
def test_every_pair_that_may_fire_survives(D, activation, row_size, key_size, seed, heavy):
    """Random rows and keys of every size, heavy-tailed or not, with biases that put each score beside the cut-off."""
    random = np.random.default_rng(seed)
    rows, keys = (random.standard_cauchy((n, D)) if heavy else random.standard_normal((n, D)) for n in (1, 60))
    x = torch.from_numpy(rows[0] * 2.0**row_size / np.abs(rows).max()).float()
    k = torch.from_numpy(keys * 2.0**key_size / np.abs(keys).max()).float()
    scores = k.double() @ x.double()
    away = torch.from_numpy(random.choice([0.0, 1e-7, -1e-7, 1e-6, -1e-6, 1e-4, -1e-4, -0.01, -0.1], 60))
    size = k.double().norm(dim=1) * x.double().norm()
    bias = (CUTS[activation] - scores + away * size).float()
    assert_bound_holds(x, k, bias, activation)


def test_the_bound_passes_over_what_it_should():
    """A screening that keeps everything is exact as well: at the sizes of real patches it must not."""
    x, keys, bias, values = draw(50, 768, 2000, 3, offset=-4)
    result = assert_exact(x, keys, bias, values, "relu")
    fired = len(result[3]) // 16
    assert 0 < fired < result[2] < 4 * fired
