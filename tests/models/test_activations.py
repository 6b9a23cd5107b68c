from __future__ import annotations

import pytest
import torch
from torch import nn

from xpatch.models.activations import activation_of, recognise


@pytest.mark.parametrize(
    "function, expected",
    [
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.nn.functional.silu, "silu"),
        (torch.tanh, None),
        (lambda x: 1 / 0, None),
        (nn.Linear(81, 81), None),
    ],
)
def test_an_activation_is_known_by_its_values(function, expected):
    assert recognise(function) == expected
    with torch.device("meta"):
        assert recognise(function) == expected


def test_what_holds_packed_weights_is_no_activation():
    """torch's quantised linears hold a module that returns its input."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)

    packed = nn.Module()
    packed.register_module("pass_through", nn.Flatten(0, 0))
    assert activation_of(packed, nn.Module()) == "identity"
    holder = Holder()
    holder.up.register_module("pass_through", packed)
    assert activation_of(holder, nn.Module()) == "silu"
    assert activation_of(nn.Module(), nn.Module()) == "unknown"
