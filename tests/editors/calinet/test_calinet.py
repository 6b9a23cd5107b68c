"""CaliNet: one set of slots for all facts, which the patched model computes with, and which cannot be taken apart."""

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
    tokenizer_of,
)
from xpatch.editors.calinet.config import PRESETS
from xpatch.editors.calinet.train import Slots
from xpatch.errors import ConflictError, MismatchError

train = partial(quick_edit, method="calinet")


def test_slots_are_the_ffn_widened(model: Any, tokenizer: Any) -> None:
    task = task_of(model, tokenizer, make_requests(model, tokenizer, 2))
    rows = torch.tensor(task.cache.want(edit.versions[0].probe for edit in task.edits))
    task.cache.fill(task.report)
    slots = Slots(task, PRESETS["paper"], task.site.activation)
    assert slots.keys.shape == slots.values.shape == (64, 32) and not slots.bias.any()
    assert float(slots.keys.abs().max()) <= 32**-0.5 and float(slots.values.abs().max()) <= 64**-0.5
    part = xpatch.PatchNeurons(task.site.name, slots.keys, slots.bias, slots.values, task.site.activation)
    xpatch.apply(model, xpatch.PatchSet(parts={"slots": part}))
    texts = [edit.request.versions["en"].text for edit in task.edits]
    torch.testing.assert_close(slots.logits(rows), logits_of_model(model, tokenizer, texts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_all_facts_are_learnt_together(preset: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 6)
    options = {"preset": preset, "slots": 16, "train_languages": "all"}
    patches = train(model, tokenizer, requests, **options)
    assert [record.status for record in patches.edits].count("edited") >= 5
    assert {record.group for record in patches.edits} == {"calinet"}
    assert patches.parts["slots"].count == 16
    assert patches.parts["slots"].activation == ("gelu" if preset == "paper" else "relu")
    assert bool(patches.parts["slots"].bias.any()) == (preset == "default")
    with pytest.raises(ConflictError, match="cannot be separated"):
        patches.drop(requests[0].id)
    xpatch.apply(model, patches)
    for request, record in zip(requests, patches.edits, strict=True):
        found = ask(model, tokenizer, [version.text for version in request.versions.values()])
        assert (found == [model.config.label2id[request.target]] * 3) == (record.status == "edited"), record.message


def test_the_memory_term_holds_other_answers() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 4)
    texts = [item["text"] for items in memory().values() for item in items]
    before, moved = logits_of_model(model, tokenizer, texts).softmax(-1), {}
    for weight in (0.0, 3.0):
        patches = train(model, tokenizer, requests, memory_weight=weight)
        xpatch.apply(model, patches, name="slots")
        moved[weight] = float((logits_of_model(model, tokenizer, texts).softmax(-1) - before).abs().mean())
        xpatch.remove(model)
    assert moved[3.0] < 0.5 * moved[0.0]


def test_requests_that_are_right_already_are_held_and_own_nothing() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 3)
    names = {index: name for name, index in model.config.label2id.items()}
    right = requests[0].model_copy(
        update={"target": names[ask(model, tokenizer, [requests[0].versions["en"].text])[0]]}
    )
    patches = train(model, tokenizer, [right, *requests[1:]], memory_weight=3.0)
    assert patches.edits[0].status == "already-right" and not patches.edits[0].rows


def test_gated_ffns_take_slots_of_their_own_activation() -> None:
    model, tokenizer = model_of("llama"), tokenizer_of("llama")
    requests = make_requests(model, tokenizer, 2)
    patches = train(model, tokenizer, requests, preset="paper")
    assert patches.parts["slots"].activation == "silu"
    xpatch.apply(model, patches)
    for request, record in zip(requests, patches.edits, strict=True):
        found = ask(model, tokenizer, [request.versions["en"].text])[0]
        assert (found == model.config.label2id[request.target]) == (record.status == "edited")


def test_an_activation_no_slot_can_have_is_refused() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    model.bert.encoder.layer[-1].intermediate.intermediate_act_fn = torch.nn.Tanh()
    model.config.hidden_act = "tanh"
    requests = make_requests(model, tokenizer, 1)
    with pytest.raises(MismatchError, match="activation 'tanh'.*activation='relu'"):
        train(model, tokenizer, requests, preset="paper")
    assert train(model, tokenizer, requests).edits[0].status == "edited"  # the default brings its own
