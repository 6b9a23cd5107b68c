"""FT-L: the box holds for every weight after any number of edits, and any FFN of the model can be the one trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import xpatch
from tests.editors.conftest import (
    ask,
    logits_of_model,
    make_requests,
    memory,
    model_of,
    quick_edit,
    task_of,
    texts_of,
    tokenizer_of,
)
from xpatch.editors.ft_l.config import PRESETS
from xpatch.editors.ft_l.train import BoxedTraining, FinalLayer, InnerLayer
from xpatch.errors import FormatError, MismatchError
from xpatch.models.anatomy import find_ffn_sites

train = partial(quick_edit, method="ft-l")


@pytest.mark.parametrize("box", [5e-4, 2e-2])
def test_all_edits_together_stay_in_the_box_of_the_base(box: float) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    patches = train(model, tokenizer, make_requests(model, tokenizer, 5), box=box)
    weight = patches.parts["down"].weight
    assert float(weight.abs().max()) == pytest.approx(box)
    assert patches.parts["down"].bias is None and set(patches.tensors) == {"down.weight"}


def test_published_boxes() -> None:
    boxes = {name: PRESETS[name].box for name in ("paper", "gpt2-large", "gpt2-medium", "gpt-j")}
    assert boxes == {"paper": 5e-4, "gpt2-large": 1e-3, "gpt2-medium": 2e-3, "gpt-j": 5e-5}
    assert (PRESETS["paper"].learning_rate, PRESETS["paper"].steps, PRESETS["paper"].enough) == (5e-4, 25, 1e-2)


def test_the_last_layer_on_cached_rows_is_the_model(model: Any, tokenizer: Any) -> None:
    requests = make_requests(model, tokenizer, 2)
    task = task_of(model, tokenizer, requests)
    rows = torch.tensor(task.cache.want(w.probe for edit in task.edits for w in (*edit.versions, *edit.rephrases)))
    task.cache.fill(task.report)
    quick, whole = FinalLayer(task), InnerLayer(task, task.site)
    torch.testing.assert_close(quick.logits(rows), task.cache.logits[rows], rtol=1e-4, atol=1e-4)
    quick.delta = whole.delta = torch.randn(quick.delta.shape, generator=torch.Generator().manual_seed(0)) / 10
    with torch.no_grad():
        after = whole.logits(rows)
    torch.testing.assert_close(quick.logits(rows), after, rtol=1e-4, atol=1e-4)
    assert float((after - task.cache.logits[rows]).abs().max()) > 1e-2


def test_an_edit_whose_loss_is_small_changes_nothing() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    task = task_of(model, tokenizer, make_requests(model, tokenizer, 1))
    rows = torch.tensor(task.cache.want([task.edits[0].versions[0].probe]))
    task.cache.fill(task.report)
    layer = FinalLayer(task)
    for enough, moves in ((1e9, False), (0.0, True)):
        config = PRESETS["paper"].model_copy(update={"enough": enough})
        training = BoxedTraining(layer, task.cache.logits, rows[:0], config)
        training.fit(rows, torch.tensor([task.edits[0].versions[0].label]), torch.Generator())
        assert bool(layer.delta.any()) == moves


@pytest.mark.parametrize("layer", [0, -2, 1])
def test_any_layer(layer: int) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 2)
    patches = train(model, tokenizer, requests, layer=layer)
    assert patches.parts["down"].site == find_ffn_sites(model)[layer].down
    xpatch.apply(model, patches)
    for request, record in zip(requests, patches.edits, strict=True):
        found = ask(model, tokenizer, [request.versions["en"].text])[0]
        assert (found == model.config.label2id[request.target]) == (record.status in ("edited", "already-right"))
    assert "edited" in [record.status for record in patches.edits]


def test_a_layer_that_is_not_there() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    with pytest.raises(FormatError, match="layer: expected -2 to 1, the model has 2 FFNs; found 2"):
        train(model, tokenizer, make_requests(model, tokenizer, 1), layer=2)


def test_gated_ffns_have_a_down_projection_and_fine_tuning_of_both_linears_refuses_them() -> None:
    model, tokenizer = model_of("llama"), tokenizer_of("llama")
    requests = make_requests(model, tokenizer, 1)
    before = logits_of_model(model, tokenizer, texts_of(requests))
    patches = train(model, tokenizer, requests)
    assert patches.edits[0].status == "edited"
    xpatch.apply(model, patches)
    assert ask(model, tokenizer, [requests[0].versions["en"].text]) == [model.config.label2id[requests[0].target]]
    xpatch.remove(model)
    assert torch.equal(logits_of_model(model, tokenizer, texts_of(requests)), before)
    with pytest.raises(MismatchError, match="is gated; fine-tuning knows FFNs of two linears"):
        xpatch.edit(model, tokenizer, requests, "ft", memory=memory(), progress=False)
