"""The screening of patch_ffn: exact to the bit, at every shape (csrc/screen/PROOF.md)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.screening import CUTS, DTYPES, activations, assert_exact, draw, seeds
from xpatch.ops import pack_keys, patch_ffn


@settings(max_examples=60)
@given(
    M=st.integers(1, 40), D=st.integers(1, 300), N=st.integers(1, 90), V=st.integers(0, 40), activation=activations,
    dtype=st.sampled_from(DTYPES), offset=st.sampled_from([-9.0, -4.0, -1.0, 2.0]), seed=seeds,
)  # fmt: skip
def test_screened_has_the_bits_of_unscreened(M, D, N, V, activation, dtype, offset, seed):
    assert_exact(*draw(M, D, N, V, seed, dtype, offset), activation)


@pytest.mark.parametrize("activation", CUTS)
@pytest.mark.parametrize("D", [1, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 769, 1024])
def test_widths_beside_the_blocks_of_the_kernel(D, activation):
    assert_exact(*draw(19, D, 70, 9, D, offset=CUTS[activation] - 1.5), activation)


def test_the_widest_keys_and_the_first_too_wide():
    x, keys, bias, values = draw(3, 32768, 20, 4, offset=-1.5)
    assert_exact(x, keys, bias, values, "relu")
    extreme = torch.full((1, 32768), 1.0)  # sums of the largest bytes: nothing may wrap or saturate
    flat = torch.stack([extreme[0], -extreme[0]])
    assert_exact(extreme, flat, torch.tensor([-3e4, 3e4]), torch.ones(2, 1), "relu")
    assert pack_keys(torch.zeros(2, 32769), bias[:2], "relu") is None


@pytest.mark.parametrize("N", [1, 15, 16, 17, 31, 100_003])
def test_counts_beside_the_groups_of_the_kernel(N):
    assert_exact(*draw(3, 5, N, 2, N), "relu")
    assert_exact(*draw(2, 18, N, 2, N, offset=-7.0), "gelu")


@pytest.mark.parametrize("M", [0, 1, 2, 3, 4, 5, 11, 12, 13, 95, 96, 97, 4097])
def test_rows_beside_the_tiles_of_the_kernel(M):
    result = assert_exact(*draw(M, 20, 40, 3, M, offset=-2.0), "relu")
    assert M < 11 or 0 < result[2] < result[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_neurons(dtype):
    x, keys, bias, values = draw(3, 5, 0, 4, dtype=dtype)
    assert pack_keys(keys, bias, "relu") is None
    assert torch.equal(patch_ffn(x, keys, bias, values, "relu", None), torch.zeros(3, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_keys(dtype):
    x, keys, bias, values = draw(7, 21, 50, 6, dtype=dtype)
    plain = pack_keys(keys, bias, "relu")
    wide = torch.empty(50, 30, dtype=dtype)
    wide[:, 3:24] = keys
    flat = torch.empty(50 * 21 + 1, dtype=dtype)
    flat[1:] = keys.flatten()
    spread = torch.empty(100, dtype=dtype)
    spread[::2] = bias
    for laid_out in (wide[:, 3:24], flat[1:].view(50, 21), keys.T.contiguous().T):
        packed = pack_keys(laid_out, spread[::2], "relu")
        assert torch.equal(packed, plain)
        assert_exact(x, laid_out, spread[::2], values, "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_language_masks_come_before_the_screening(dtype):
    x, keys, bias, values = draw(30, 40, 60, 8, dtype=dtype)
    inner, outer = (torch.rand(3, width).round().to(dtype) * 30 for width in (40, 8))
    language = torch.randint(3, (30,))
    result = assert_exact(x, keys, bias - 20, values, "relu", (inner, outer, language))
    assert 0 < result[2] < result[1]
