"""Coordinates of training: folding them away changes nothing, and they suit models whose rows are of any scale."""

from __future__ import annotations

import pytest
import torch

from tests.editors.conftest import make_requests, memory, model_of, tokenizer_of
from xpatch.editors import edit
from xpatch.editors.t_patcher.coordinates import Coordinates


@pytest.mark.parametrize("make", [Coordinates.scaled, Coordinates.whitened])
def test_folded_keys_answer_as_those_in_coordinates(make):
    rows = 40 * torch.randn(200, 24) @ torch.randn(24, 24) + 7
    coordinates = make(rows)
    keys, bias = torch.randn(3, 2, 24), torch.randn(3, 2)
    folded, shifted = coordinates.fold(keys, bias)
    expected = torch.einsum("md,epd->mep", coordinates.forward(rows).double(), keys.double()) + bias
    found = torch.einsum("md,epd->mep", rows.double(), folded.double()) + shifted
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_scaled_rows_are_centred_with_unit_variance():
    moved = Coordinates.scaled(torch.randn(500, 8) * torch.rand(8) * 30 + 5).forward
    rows = torch.randn(500, 8) * 12 - 3
    again = Coordinates.scaled(rows).forward(rows)
    assert again.mean(0).abs().max() < 1e-4 and abs(again.var(0).mean() - 1) < 1e-4
    assert moved(rows).shape == rows.shape


def test_whitened_rows_vary_half_as_they_do_and_half_alike():
    rows = (torch.randn(400, 6) * torch.tensor([9.0, 3.0, 1.0, 1.0, 0.5, 0.0]) + 2) @ torch.linalg.qr(
        torch.randn(6, 6)
    )[0]
    moved = Coordinates.whitened(rows).forward(rows).double()
    assert moved.mean(0).abs().max() < 1e-3
    variances = torch.linalg.eigvalsh(torch.cov(rows.double().T))
    expected = 2 * variances / (variances + variances.mean())  # below 2 for every direction, 0 where nothing varies
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(moved.T)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [torch.zeros(0, 4), torch.ones(1, 4)])
@pytest.mark.parametrize("make", [Coordinates.scaled, Coordinates.whitened])
def test_too_few_rows_change_nothing(rows, make):
    x = torch.randn(5, 4)
    assert torch.equal(make(rows).forward(x), x)


@pytest.mark.parametrize("width", [1, 3])
def test_equal_rows_give_finite_coordinates(width):
    rows = torch.full((7, width), 2.5)
    for make in (Coordinates.scaled, Coordinates.whitened):
        assert make(rows).forward(torch.randn(4, width)).isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "xlmr", "gpt2"])
def test_default_preset_edits_models_of_any_scale(kind):
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    requests = make_requests(model, tokenizer)
    patches = edit(model, tokenizer, requests, "mpn", memory=memory(), progress=False)
    assert {record.status for record in patches} <= {"edited", "already-right"}
