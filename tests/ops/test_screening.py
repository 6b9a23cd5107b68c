"""The screening of patch_ffn: exact to the bit, whatever is thrown at it (csrc/screen/PROOF.md)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from xpatch.ops import native, pack_keys, patch_ffn, reference
from xpatch.ops.registry.patch_ffn import native_call
from xpatch.ops.screening import COARSE_FROM_NEURONS, COARSE_FROM_WIDTH

NAN, INF, LARGEST = math.nan, math.inf, torch.finfo(torch.float32).max
CUTS = {"relu": 0.0, "gelu": -5.543, "gelu_tanh": -5.158, "silu": -88.723}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NO_MASKS = (None, None, None)

activations = st.sampled_from(list(CUTS))
seeds = st.integers(0, 2**32)


def draw(M, D, N, V, seed=0, dtype=torch.float32, offset=-1.0):
    """x, keys, bias, values: scores of about unit size around `offset`."""
    generator = torch.Generator().manual_seed(seed)
    x, keys, bias, values = (torch.randn(s, generator=generator) for s in ((M, D), (N, D), (N,), (N, V)))
    return x.to(dtype), (keys / D**0.5).to(dtype), (bias + offset).to(dtype), values.to(dtype)


def unscreened(keys, bias, activation):
    """Packed keys that every row keeps: a neuron whose bias is not finite is never passed over."""
    return pack_keys(keys, torch.full_like(bias, INF), activation)


def run(x, keys, bias, values, activation, packed, masks=NO_MASKS, **more):
    return native_call(x, keys, bias, values, activation, packed, masks, always=True, **more)


def same_bits(one, two):
    """Equal to the bit; a NaN equals any other."""
    kind = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return one.shape == two.shape and bool(((one.view(kind) == two.view(kind)) | (one.isnan() & two.isnan())).all())


def assert_exact(x, keys, bias, values, activation, masks=NO_MASKS):
    """The screened call has the bits, and the fired pairs, of the one that computes every neuron. Returns its counts."""
    found = run(x, keys, bias, values, activation, pack_keys(keys, bias, activation), masks, want_fired=True)
    whole = run(x, keys, bias, values, activation, unscreened(keys, bias, activation), masks, want_fired=True)
    pairs = x.shape[:-1].numel() * keys.shape[0]
    assert whole[1][1:3] == (pairs, pairs) and found[1][1] == pairs
    assert found[1][3] == whole[1][3]
    assert same_bits(found[0], whole[0])
    return found[1]


def survivors(x, keys, packed, activation):
    """Which (row, neuron) pairs are not passed over: with a huge bias, all that are computed fire."""
    huge, values = keys.new_full((keys.shape[0],), 2.0**126), keys.new_zeros((keys.shape[0], 0))
    _, result = run(x, keys, huge, values, activation, packed, want_fired=True)
    kept = torch.zeros(x.shape[0], keys.shape[0], dtype=torch.bool)
    if result[3]:
        rows, neurons = torch.frombuffer(bytearray(result[3]), dtype=torch.int64).view(-1, 2).T
        kept[rows, neurons] = True
    assert int(kept.sum()) == result[2]
    return kept


# --- Exactness -------------------------------------------------------------------------------------------------------


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


# --- The traps -------------------------------------------------------------------------------------------------------


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


# --- The bound -------------------------------------------------------------------------------------------------------


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


def biases_around(x, keys, cut, steps, further=40):
    """For one row x `[D]` and one key `[D]`: fp32 biases that put the score at, just above and just below the cut-off."""
    score = float(x.double() @ keys.double())
    at = np.float32(cut - score)
    around = at + np.arange(-steps, steps + 1) * np.spacing(np.abs(at))
    size = float(x.double().norm() * keys.double().norm())
    below = at - size * np.geomspace(1e-8, 0.3, further)
    return torch.tensor(np.concatenate([around, below]), dtype=torch.float32)


def scores_in_many_orders(x, keys, bias):
    """fp32 scores of one row x `[D]`, summed in orders that a dense kernel might use -> `[orders, N]`."""
    products = (x * keys).numpy()
    first = np.concatenate([bias.numpy()[:, None], products], 1)
    many = [np.cumsum(first, 1, dtype=np.float32)[:, -1], np.cumsum(first[:, ::-1], 1, dtype=np.float32)[:, -1]]
    many += [first.sum(1), products.sum(1) + bias.numpy(), np.sort(first, 1).sum(1)]
    many += [np.cumsum(np.sort(first, 1), 1, dtype=np.float32)[:, -1]]
    dense = [F.linear(x[None], keys, bias)[0], (keys @ x) + bias, torch.addmm(bias[:, None], keys, x[:, None])[:, 0]]
    return np.stack(many + [d.numpy() for d in dense])


def assert_bound_holds(x, keys, bias, activation, packed=None):
    """No neuron whose score may reach the cut-off is passed over, in any order of fp32 or in float64; returns the survivors."""
    packed = pack_keys(keys, bias, activation) if packed is None else packed
    kept = survivors(x[None], keys, packed, activation)[0]
    cut = CUTS[activation]
    exact = keys.double() @ x.double() + bias.double()
    assert kept[exact >= cut].all()
    for scores in scores_in_many_orders(x, keys, bias):
        passed = torch.from_numpy(scores)[~kept]
        assert (passed < cut).all()
        assert not reference.activate(passed, activation).any()
    return kept


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


# --- The coarse stage ------------------------------------------------------------------------------------------------


def pack_along(keys, bias, activation, basis):
    """Keys packed with directions `[R, D]` of the test's own choice."""
    module, code = native.load(), list(reference.ACTIVATIONS).index(activation)
    basis = basis.contiguous()
    packed = torch.empty(module.packed_bytes(*keys.shape, len(basis)), dtype=torch.uint8)
    module.pack_keys_cpu(
        keys.data_ptr(),
        bias.data_ptr(),
        *keys.shape,
        keys.stride(0),
        0,
        code,
        basis.data_ptr(),
        len(basis),
        packed.data_ptr(),
        1,
    )
    return packed


def among_silent_ones(keys, bias):
    """Every fourth group of 16 neurons never fires. The kernel samples those alone, and so uses the coarse stage."""
    count = -(-len(keys) // 96) * 2  # eight groups each: the sample takes every eighth
    room = torch.zeros(count, 64, keys.shape[1]), torch.full((count, 64), -1e4)
    for target, source in zip(room, (keys, bias), strict=True):
        some = torch.cat([source, target[0, :1].expand(count * 48 - len(source), *source.shape[1:])])
        target[:, 16:] = some.view(count, 48, *source.shape[1:])
    return room[0].view(-1, keys.shape[1]), room[1].view(-1)


def orthonormal(R, D, seed=0):
    return torch.linalg.qr(
        torch.randn(D, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q.T.float()


BASES = {
    "random": lambda R, D: orthonormal(R, D),
    "axes": lambda R, D: torch.eye(D)[:R],
    "skewed": lambda R, D: orthonormal(R, D) * (1 + 0.003 / R**0.5) + 0.001 / R * orthonormal(R, D, 1),
    "short": lambda R, D: orthonormal(R, D) * (1 - 0.004 / R**0.5),
}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("R", "D"), [(1, 1), (1, 9), (9, 9), (4, 33), (16, 256), (65, 300), (64, 64)])
def test_the_bound_of_the_coarse_stage_holds(R, D, basis, activation):
    """Rows and keys inside, outside and across the basis, opposite to each other and not, with biases beside the cut-off."""
    generator = torch.Generator().manual_seed(R * D)
    directions = BASES[basis](R, D)
    inside = torch.randn(4, R, generator=generator) @ directions
    across = torch.randn(4, D, generator=generator)
    outside = across - across @ torch.linalg.pinv(directions) @ directions if R < D else across[:0]
    some = torch.cat([inside, across, outside, 100 * inside + across, torch.eye(D)[-1:]])
    coarse = 0
    for x in some:
        keys = torch.cat([some, -some, -x[None] * 3])
        biases = torch.stack([biases_around(x, key, CUTS[activation], 2, 12) for key in keys])
        keys, bias = among_silent_ones(keys.repeat_interleave(biases.shape[1], 0), biases.flatten())
        packed = pack_along(keys, bias, activation, directions)
        assert_bound_holds(x, keys, bias, activation, packed)
        coarse += run(x[None], keys, bias, keys.new_zeros(len(keys), 0), activation, packed)[1][4]
    assert coarse > 0


def test_coarse_keys_have_the_bits_of_unscreened():
    """As `pack_keys` chooses the directions, for the shapes where it does."""
    x, keys, bias, values = draw(40, 300, COARSE_FROM_NEURONS + 5, 5, offset=-5.5)
    keys, x = keys * torch.logspace(0, -5, 300), x * torch.logspace(0.7, -1, 300)
    result = assert_exact(x, keys, bias, values, "relu")
    assert result[4] and 0 < result[2] < 0.05 * result[1]
    x[3, 5], x[4], keys[7], bias[9] = NAN, 0, INF, NAN
    assert_exact(x, keys, bias, values, "relu")


@pytest.mark.parametrize("many", [False, True])
def test_rows_choose_the_directions_and_change_no_bit(many, monkeypatch):
    """Rows are long in 40 coordinates, keys in all: only who knows the rows can look at those 40 first."""
    x, keys, bias, values = draw(200, 256, COARSE_FROM_NEURONS, 5, offset=-5.5)
    x[:, torch.randperm(256)[40:]] *= 0.02
    if many:
        monkeypatch.setattr("xpatch.ops.screening.QUARTER_FROM_BYTES", keys.numel())
    plain, known = pack_keys(keys, bias, "relu"), pack_keys(keys, bias, "relu", x[::2].half())
    assert known.numel() < plain.numel() if many else known.numel() == plain.numel()
    found = {}
    for name, packed in (("plain", plain), ("known", known)):
        out, found[name] = run(x[1::2], keys, bias, values, "relu", packed)
        assert same_bits(out, run(x[1::2], keys, bias, values, "relu", unscreened(keys, bias, "relu"))[0])
    assert found["known"][4] and found["known"][2] < 0.01 * found["known"][1] and not found["plain"][4]


@pytest.mark.parametrize(
    "rows", [torch.zeros(3, 64), torch.full((3, 64), NAN), torch.full((3, 64), 1e38), torch.zeros(0, 64)]
)
def test_odd_rows_change_no_bit_either(rows):
    x, keys, bias, values = draw(4, COARSE_FROM_WIDTH, COARSE_FROM_NEURONS, 2, offset=-5)
    assert pack_keys(keys, bias, "relu", rows).numel() == pack_keys(keys, bias, "relu").numel()
    expected = run(x, keys, bias, values, "relu", pack_keys(keys, bias, "relu"))[0]
    assert same_bits(run(x, keys, bias, values, "relu", pack_keys(keys, bias, "relu", rows))[0], expected)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-12, 1e16, 1e30])
def test_directions_of_keys_of_every_size(size):
    x, keys, bias, values = draw(4, COARSE_FROM_WIDTH, COARSE_FROM_NEURONS, 2, offset=-5)
    assert_exact(x, keys * size, bias, values, "relu")
    keys[:, 3:] = 0  # of rank 3
    assert_exact(x, keys * size, bias, values, "gelu")


def test_rows_and_keys_with_next_to_nothing_along_the_basis():
    """Scaled up by what little there is, the rest would overflow."""
    directions = torch.eye(8)[:1]
    for little in (0.0, 1e-45, 1e-13, 2.0**-40, 1e-11, 1e-6):
        x, key = torch.ones(8), -torch.ones(8)
        x[0] = key[0] = little
        for size in (1.0, 2.0**24, 2.0**50):
            biases = biases_around(x * size, key * size, 0.0, 2, 12)
            keys, bias = among_silent_ones((key * size).repeat(len(biases), 1), biases)
            assert_bound_holds(x * size, keys, bias, "relu", pack_along(keys, bias, "relu", directions))


def test_a_basis_that_is_not_orthonormal_is_refused():
    _, keys, bias, _ = draw(1, 20, 30, 1)
    for basis, words in [
        (torch.ones(2, 20), "not orthonormal"),
        (torch.full((2, 20), NAN), "not orthonormal"),
        (1.01 * orthonormal(8, 20), "not orthonormal"),
        (torch.eye(21, 20), "at most 20 directions, found rank 21"),
    ]:
        with pytest.raises(native.load().NativeError, match=words):
            pack_along(keys, bias, "relu", basis)
