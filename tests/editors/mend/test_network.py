"""MEND's formulas at the start, its ReLU, its statistics, and that it trains at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.editors.conftest import model_of, tokenizer_of
from tests.editors.hyper.conftest import probes, signals_of
from xpatch.editors.lime.config import MEND_PRESETS
from xpatch.editors.mend.config import PRESETS
from xpatch.editors.mend.network import Mend, relu
from xpatch.editors.mend.normalise import RunningNorm


@pytest.fixture
def case() -> tuple[Any, Any]:
    return signals_of(model_of("bert"), tokenizer_of("bert"), probes(), [0, 1, 2])


@pytest.mark.parametrize("settings", [PRESETS["paper"], MEND_PRESETS["paper"], MEND_PRESETS["default"]])
def test_at_the_start_it_is_alpha_times_the_normalised_gradient(case: Any, settings: Any) -> None:
    items, signals = case
    network = Mend(items, settings)
    network.train()
    network(signals)  # the running statistics see the rows
    network.eval()
    for item, found in zip(items, network(signals).values(), strict=True):
        shape = network.networks[network.shapes.index(item.shape)]
        seen = signals[item.name]
        if settings.normalisation == "layernorm":
            x = torch.nn.functional.layer_norm(seen.x, (item.inside,), eps=settings.epsilon)
            delta = torch.nn.functional.layer_norm(seen.delta, (item.outside,), eps=settings.epsilon)
        else:
            x, delta = shape.norm_x(seen.x), shape.norm_delta(seen.delta)
        for edit in range(3):
            mine = seen.owner == edit
            dense = settings.alpha * sum(torch.outer(d, v) for d, v in zip(delta[mine], x[mine], strict=True))
            assert torch.allclose(found.dense(edit), dense, atol=1e-5)
            assert len(found.of(edit).down) == int(mine.sum())  # rank at most T


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_the_gradient_of_u_is_not_zero_at_the_start(case: Any, preset: str) -> None:
    """Every pre-activation is 0 then: with a derivative of 0 there, U, V, bias, s and t would stay as they are for ever."""
    items, signals = case
    network = Mend(items, PRESETS[preset])
    network.train()
    sum(found.dense(0).square().sum() for found in network(signals).values()).backward()
    for part in network.networks:
        for layer in part.layers:
            assert (
                layer.up.grad.abs().sum() > 0 and layer.bias.grad.abs().sum() > 0 and layer.shift.grad.abs().sum() > 0
            )
    z = torch.zeros(3, requires_grad=True)
    relu(z).sum().backward()
    assert z.grad.tolist() == [1, 1, 1]
    assert relu(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [0, 0, 3]


def test_one_network_per_shape_and_one_scale_per_matrix(case: Any) -> None:
    items, _ = case
    network = Mend(items, PRESETS["default"])
    assert len(network.networks) == 2 and network.alpha.shape == (4,)
    assert all(layer.scale.shape == (2, 96) for part in network.networks for layer in part.layers)
    groups = {network.group_of(name) for name, _ in network.named_parameters()}
    assert groups == {"main", "step"}


def test_a_matrixs_own_scale_acts_on_it_alone(case: Any) -> None:
    items, signals = case
    network = Mend(items, PRESETS["default"])
    network.train()
    before = network(signals)
    network.eval()
    before = network(signals)
    with torch.no_grad():
        network.networks[0].layers[0].shift[1] += 0.5
    after = network(signals)
    changed = [not torch.equal(before[item.name].down, after[item.name].down) for item in items]
    second = [number for number, item in enumerate(items) if item.shape == network.shapes[0]][1]
    assert changed == [number == second for number in range(4)]


def test_running_statistics_are_those_of_all_rows() -> None:
    rows = torch.randn(50, 6) * torch.arange(1, 7) + 3
    norm = RunningNorm(6).train()
    for part in rows.split([1, 20, 0, 29]):
        norm(part)
    assert float(norm.count) == 50 and torch.allclose(norm.mean, rows.mean(0), atol=1e-5)
    norm.eval()
    assert torch.allclose(norm(rows), (rows - rows.mean(0)) / rows.std(0), atol=1e-4)
    again = RunningNorm(6)
    again.load_state_dict(norm.state_dict())
    again.train()(rows + 1)
    assert float(again.count) == 100  # went on, did not begin anew
