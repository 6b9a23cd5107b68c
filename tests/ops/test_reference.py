"""The pure-torch maths against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from xpatch.errors import MismatchError
from xpatch.ops import reference

FORMULAS = {
    "relu": lambda z: max(z, 0.0),
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "identity": lambda z: z,
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_activations(activation):
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[activation](v) for v in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(reference.activate(z, activation), expected)


def test_every_activation_has_a_formula_here():
    assert list(FORMULAS) == list(reference.ACTIVATIONS)


def test_patch_ffn_neuron_by_neuron():
    x, keys, bias, values = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(5, 2)
    expected = torch.zeros(3, 2)
    for m in range(3):
        for n in range(5):
            expected[m] += max(float(x[m] @ keys[n] + bias[n]), 0.0) * values[n]
    torch.testing.assert_close(reference.patch_ffn(x, keys, bias, values, "relu"), expected)


def test_patch_ffn_with_masks_and_what_fired_neuron_by_neuron():
    x, keys, bias, values = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(5, 2)
    inner, outer, language = torch.rand(3, 4), torch.rand(3, 2), torch.tensor([2, 0])
    expected, pairs = torch.zeros(2, 3, 2), []
    for b in range(2):
        for t in range(3):
            for n in range(5):
                score = float((x[b, t] * inner[language[b]]) @ keys[n] + bias[n])
                expected[b, t] += max(score, 0.0) * values[n] * outer[language[b]]
                if score > 0:
                    pairs.append([3 * b + t, n])
    out, fired = reference.patch_ffn_fired(x, keys, bias, values, "relu", inner, outer, language)
    torch.testing.assert_close(out, expected)
    assert fired.tolist() == pairs and fired.is_contiguous()
    none = reference.patch_ffn_fired(x[:0], keys[:0], bias[:0], values[:0], "relu")
    assert none[0].shape == (0, 3, 2) and none[1].shape == (0, 2)


def test_lowrank_and_dense():
    x, down, up, bias = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(5, 2), torch.randn(5)
    torch.testing.assert_close(reference.lowrank(x, down, up), x @ (up @ down).t())
    torch.testing.assert_close(reference.dense(x, up @ down, bias), reference.lowrank(x, down, up) + bias)
    assert torch.equal(reference.lowrank(x, down[:0], up[:, :0]), torch.zeros(2, 3, 5))


def test_mask_per_row_and_per_item():
    masks = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    x = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    assert reference.mask(x, masks, torch.tensor([0, 1])).tolist() == [[3.0, 4.0], [0.0, 12.0]]
    items = x.expand(2, 2, 2)
    assert reference.mask(items, masks, torch.tensor([0, 1])).tolist() == [
        [[3.0, 4.0], [5.0, 6.0]],
        [[0.0, 8.0], [0.0, 12.0]],
    ]


def test_unknown_activation():
    with pytest.raises(MismatchError, match="'tanh'"):
        reference.activate(torch.zeros(1), "tanh")
