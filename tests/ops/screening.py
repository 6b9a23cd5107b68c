"""What the tests of the screening share: drawn cases, which pairs were kept, and what each must satisfy."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from xpatch.ops import pack_keys, reference
from xpatch.ops.registry.patch_ffn import native_call

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
