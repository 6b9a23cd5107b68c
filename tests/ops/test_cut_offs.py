"""The cut-offs of csrc/screen/PROOF.md, section 5: below them an fp32 activation is exactly 0, ours and PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch

from xpatch.ops import pack_keys, reference
from xpatch.ops.registry.patch_ffn import native_call

CUTS = {"relu": 0.0, "gelu": -5.543, "gelu_tanh": -5.158, "silu": -88.723}
#: Where PyTorch's own fp32 kernels become 0, rounded towards zero to what the proof quotes: of tanh the scalar one, which takes
#: what does not fill a vector, later than the vectorised one.
TORCH_ZERO_FROM = {"relu": 0.0, "gelu": -5.5427, "gelu_tanh": -5.1579, "silu": -88.7229}


def below(start, stop):
    """Every fp32 number in (stop, start), both negative."""
    first, last = (torch.tensor(value, dtype=torch.float32).view(torch.int32).item() for value in (start, stop))
    return torch.arange(first + 1, last, dtype=torch.int32).view(torch.float32)


def all_sizes_below(start):
    """Numbers below `start` over all exponents, to the most negative one."""
    exponents = torch.linspace(math.log2(max(-start, 2.0**-149)), 127.99, 100_000, dtype=torch.float64)
    numbers = -torch.exp2(exponents).float()
    return numbers[numbers < start]


def natively(z, activation):
    """The kernel's own fp32 activation of z `[K]`."""
    keys, bias, values = torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1)
    packed = pack_keys(keys, torch.full_like(bias, math.inf), activation)  # survives always

    return native_call(z[:, None], keys, bias, values, activation, packed, (None, None, None), always=True)[0].flatten()


@pytest.mark.parametrize("activation", CUTS)
def test_below_the_cut_off_our_activation_is_exactly_zero(activation):
    cut = CUTS[activation]
    window = all_sizes_below(cut) if activation == "relu" else below(cut, cut * 1.02)
    for z in (window, all_sizes_below(cut)):
        assert not natively(z, activation).any()


@pytest.mark.parametrize("activation", CUTS)
def test_below_the_cut_off_the_activation_of_torch_is_exactly_zero(activation):
    zero_from = TORCH_ZERO_FROM[activation]
    assert CUTS[activation] <= zero_from
    window = all_sizes_below(zero_from) if activation == "relu" else below(zero_from, zero_from * 1.02)
    for z in (window, all_sizes_below(zero_from)):
        assert not reference.activate(z, activation).any()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_the_cut_offs_are_no_lower_than_needed(activation):
    """A little above, the kernel's own activation is not 0: what is cut off is next to nothing."""
    assert natively(torch.tensor([CUTS[activation] + 0.01]), activation).item() < 0


@pytest.mark.parametrize(("activation", "most"), [("gelu", 8.3e-8), ("gelu_tanh", 7.7e-8), ("silu", 2.7e-37)])
def test_distance_of_the_cut_off_to_the_formula(activation, most):
    """What fp32 leaves out: the activation of the real number at the cut-off, the largest there is below it."""
    z = torch.tensor([CUTS[activation]], dtype=torch.float64)
    distance = abs(reference.activate(z, activation).item())
    if activation == "gelu":  # erf itself has no digits left here
        distance = -z.item() * 0.5 * math.erfc(-z.item() / math.sqrt(2))
    assert 0.9 * most < distance < most
