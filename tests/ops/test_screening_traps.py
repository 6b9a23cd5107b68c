"""Rows, keys and biases on which a screening could go wrong: outliers, zeros, NaN, underflow and overflow."""

from __future__ import annotations

import pytest
import torch

from tests.ops.screening import CUTS, DTYPES, INF, LARGEST, NAN, assert_exact, draw, run, survivors, unscreened
from xpatch.ops import pack_keys, reference


@pytest.mark.parametrize("D", [12, 64, 768])
@pytest.mark.parametrize("activation", CUTS)
def test_outlier_coordinates(D, activation):
    x, keys, bias, values = draw(20, D, 100, 7, offset=CUTS[activation] - 2)
    x[:, [1, D // 2]] *= 1000
    keys[:, 1] *= 0.001
    keys[::7, D // 2] = 0
    keys[::5] *= 1000
    assert_exact(x, keys, bias, values, activation)


SIZES = [0.0, 1e-45, 1e-38, 1e-30, 1e-20, 2.0**-41, 1e-12, 1e-11, 1.0, 1e10, 2.0**54, 2.0**56, 1e19, 1e30, 1e38]


@pytest.mark.parametrize("activation", CUTS)
@pytest.mark.parametrize("D", [3, 40])
def test_rows_and_keys_of_every_size(D, activation):
    """From nothing over denormals to what overflows, each row against each key, with biases of every size too."""
    x, keys, _, values = draw(len(SIZES), D, 8 * len(SIZES), 3)
    sizes = torch.tensor(SIZES)
    x = x / x.abs().amax(1, keepdim=True) * sizes[:, None]
    keys = keys / keys.abs().amax(1, keepdim=True) * sizes.repeat(8)[:, None]
    for bias in (0.0, -0.0, -1e-45, -1e-38, -1e-3, -6.0, -1e5, -1e30, -LARGEST):
        assert_exact(x, keys, torch.full((len(keys),), bias), values, activation)


def test_scale_zero():
    """Rows and keys of nothing but zeros: the score is the bias, and is screened by it exactly."""
    x, keys = torch.zeros(2, 20), torch.zeros(6, 20)
    x[1, :3] = torch.tensor([-0.0, 1e30, 5.0])
    bias = torch.tensor([-1.0, -1e-30, -0.0, 0.0, 1e-45, 1.0])
    packed = pack_keys(keys, bias, "relu")
    assert survivors(x[:1], keys, packed, "relu").tolist() == [[False, False, True, True, True, True]]
    assert_exact(x, keys, bias, torch.ones(6, 2), "relu")


@pytest.mark.parametrize("activation", CUTS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_in_rows_keys_and_biases(bad, dtype, activation):
    x, keys, bias, values = draw(6, 30, 40, 5, dtype=dtype, offset=CUTS[activation] - 3)
    x[2, 7] = bad
    keys[11, 29] = bad
    keys[12] = bad
    bias[13] = bad
    result = assert_exact(x, keys, bias, values, activation)
    assert result[2] >= 40 + 5 * 3  # the whole bad row, and the three bad neurons of every other
    expected = reference.patch_ffn(x, keys, bias, values, activation)
    found = run(x, keys, bias, values, activation, pack_keys(keys, bias, activation))[0]
    assert torch.equal(found.isnan(), expected.isnan()) or activation == "gelu"  # torch's gelu(inf) differs by machine


def test_a_score_that_underflows_above_zero_is_kept():
    """Each product is below the smallest fp32 number, so that the fp32 sum is positive where the true one is negative."""
    x, keys = torch.full((1, 1000), 2.0**-75), torch.full((1, 1000), -(2.0**-76))
    keys[0, 0] = 2.0**-74
    bias, values = torch.zeros(1), torch.full((1, 1), 1e30)
    assert run(x, keys, bias, values, "relu", unscreened(keys, bias, "relu"))[0] > 0
    assert_exact(x, keys, bias, values, "relu")


def test_a_score_whose_sum_overflows_is_kept():
    """The true score is far below zero, but the products are +inf and -inf: NaN, as in every dense kernel."""
    x, keys = torch.full((1, 2), 2.0**90), torch.tensor([[2.0**90, -(2.0**91)]])
    assert_exact(x, keys, torch.zeros(1), torch.ones(1, 1), "relu")
    assert run(x, keys, torch.zeros(1), torch.ones(1, 1), "relu", pack_keys(keys, torch.zeros(1), "relu"))[0].isnan()


@pytest.mark.parametrize("activation", CUTS)
def test_a_bias_that_makes_the_score_overflow_is_kept(activation):
    """gelu and silu of -inf are NaN, not 0."""
    x, keys = torch.full((1, 2), 2.0**54), torch.full((1, 2), -(2.0**54))
    for bias in (-LARGEST, -(2.0**127), -(2.0**126), -1e30):
        assert_exact(x, keys, torch.full((1,), bias), torch.ones(1, 1), activation)


def test_denormals_flushed_to_zero():
    """With flush-to-zero on, the fp32 kernel computes other numbers; the screening stays exact against it."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        test_rows_and_keys_of_every_size(40, "relu")
        test_rows_and_keys_of_every_size(3, "gelu")
    finally:
        torch.set_flush_denormal(False)
