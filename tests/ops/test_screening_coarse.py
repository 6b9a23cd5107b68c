"""The coarse stage of the screening: fewer bytes are read first, and no bit changes."""

from __future__ import annotations

import pytest
import torch

from tests.ops.screening import (
    CUTS,
    INF,
    NAN,
    assert_bound_holds,
    assert_exact,
    biases_around,
    draw,
    run,
    same_bits,
    unscreened,
)
from xpatch.ops import native, pack_keys, reference
from xpatch.ops.screening import COARSE_FROM_NEURONS, COARSE_FROM_WIDTH


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
