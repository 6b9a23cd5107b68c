"""Fine-tuning as low-rank deltas: the cut is the best there is, and the ledger says what it cost."""

from __future__ import annotations

import re

import pytest
import torch

import xpatch
from tests.editors.conftest import QUICK, logits_of_model, make_requests, memory, model_of, texts_of, tokenizer_of
from xpatch.editors.ft.rank import cut
from xpatch.patches.types import LowRankDelta


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_the_cut_is_the_nearest_product(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(delta)
    for rank in range(1, 5):
        found = cut(delta, rank)
        assert found.down.shape == (rank, shape[1]) and found.up.shape == (shape[0], rank)
        error = float(torch.linalg.norm(delta - found.product) / torch.linalg.norm(delta))
        assert found.error == pytest.approx(error, abs=1e-5)
        assert found.error == pytest.approx(float(singular[rank:].norm() / singular.norm()), abs=1e-5)
    whole = cut(delta, 100)
    assert len(whole.down) == min(shape) and whole.error < 1e-6
    torch.testing.assert_close(whole.product, delta)


def test_nothing_is_cut_from_nothing() -> None:
    found = cut(torch.zeros(4, 3), 2)
    assert found.error == 0 and not found.product.any()


def test_full_rank_answers_as_the_trained_weights_and_a_small_rank_says_what_it_moved(kind: str) -> None:
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    requests = make_requests(model, tokenizer, 3)
    options = {"memory": memory(), "progress": False, **QUICK["ft"]}
    answers, messages = {}, {}
    for rank in (32, 1):
        patches = xpatch.edit(model, tokenizer, requests, "ft", rank=rank, **options)
        assert all(isinstance(part, LowRankDelta) and part.count == rank for part in patches.parts.values())
        xpatch.apply(model, patches, name="cut")
        answers[rank] = logits_of_model(model, tokenizer, texts_of(requests)[: len(requests)])
        own = logits_of_model(model, tokenizer, [request.versions["en"].text for request in requests])
        xpatch.remove(model)
        for request, record, found in zip(requests, patches.edits, own.argmax(-1).tolist(), strict=True):
            right = found == model.config.label2id[request.target]
            assert right == (record.status in ("edited", "already-right"))
        messages[rank] = next(record.message for record in patches.edits if record.rows)
    assert "cut to rank 32" in messages[32] and "cut to rank 1:" in messages[1]
    numbers = {
        rank: [float(x) for x in re.findall(r"(?:up|down|most|texts,) ([0-9.e+-]+)", messages[rank])]
        for rank in (32, 1)
    }
    assert len(numbers[1]) == 4 and max(numbers[32]) < 1e-3 < min(numbers[1][:3])


def test_a_rank_leaves_the_biases_alone() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 1)
    patches = xpatch.edit(model, tokenizer, requests, "ft", rank=32, memory=memory(), progress=False, **QUICK["ft"])
    assert set(patches.tensors) == {"up.down", "up.up", "down.down", "down.up"}
    dense = xpatch.edit(model, tokenizer, requests, "ft", memory=memory(), progress=False, **QUICK["ft"])
    assert set(dense.tensors) == {"up.weight", "up.bias", "down.weight", "down.bias"}
