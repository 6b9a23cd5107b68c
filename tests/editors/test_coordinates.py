"""Scaled coordinates: folding them away changes nothing, and they rescue edits that plain training leaves wrong."""

from __future__ import annotations

import pytest
import torch

from tests.editors.conftest import make_requests, memory, model_of, tokenizer_of
from xpatch.editors import edit
from xpatch.editors.t_patcher.coordinates import Coordinates


def test_folded_keys_answer_as_the_scaled_ones():
    rows = 40 * torch.randn(200, 24) + 7
    coordinates = Coordinates.scaled(rows)
    keys, bias = torch.randn(3, 2, 24), torch.randn(3, 2)
    folded, shifted = coordinates.fold(keys, bias)
    expected = torch.einsum("md,epd->mep", coordinates.forward(rows).double(), keys.double()) + bias
    found = torch.einsum("md,epd->mep", rows.double(), folded.double()) + shifted
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scaled_rows_are_centred_with_unit_variance():
    moved = Coordinates.scaled(torch.randn(500, 8) * torch.rand(8) * 30 + 5).forward
    rows = torch.randn(500, 8) * 12 - 3
    again = Coordinates.scaled(rows).forward(rows)
    assert again.mean(0).abs().max() < 1e-4 and abs(again.var(0).mean() - 1) < 1e-4
    assert moved(rows).shape == rows.shape


@pytest.mark.parametrize("rows", [torch.zeros(0, 4), torch.ones(1, 4)])
def test_too_few_rows_change_nothing(rows):
    x = torch.randn(5, 4)
    assert torch.equal(Coordinates.scaled(rows).forward(x), x)


@pytest.mark.parametrize("kind", ["bert", "xlmr", "gpt2"])
def test_default_preset_edits_models_of_any_scale(kind):
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    requests = make_requests(model, tokenizer)
    patches = edit(model, tokenizer, requests, "mpn", memory=memory(), progress=False)
    assert {record.status for record in patches} <= {"edited", "already-right"}
