"""GRACE end to end: the patched model is the codebook, rows far from it keep their bits, single edits can go."""

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
from xpatch.editors.grace.config import PRESETS
from xpatch.editors.grace.editor import _Run
from xpatch.errors import ConflictError, MismatchError

train = partial(quick_edit, method="grace")


@pytest.mark.parametrize("preset", ["paper", "default"])
@pytest.mark.parametrize("radius", [0.01, 4.0])
def test_the_patched_model_is_the_codebook(model: Any, tokenizer: Any, preset: str, radius: float) -> None:
    requests = make_requests(model, tokenizer, 4)
    config = PRESETS[preset].model_copy(update={"radius": radius, "train_languages": "all", "memory_share": None})
    run = _Run(task_of(model, tokenizer, requests), config)
    product = run.product()
    texts = texts_of(requests)
    cache = run.task.cache
    known = {text: row for row, (text, _) in enumerate(cache._rows)}
    rows = torch.tensor([known[text] for text in texts if text in known])
    texts = [text for text in texts if text in known]
    expected = run.adaptor.logits(rows).detach()
    xpatch.apply(model, xpatch.PatchSet(parts=product.parts, gates=product.gates))
    found = logits_of_model(model, tokenizer, texts)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    assert [outcome.status for outcome in product.outcomes].count("edited") >= (3 if radius < 1 else 1)


def test_the_papers_value_stands_in_place_of_the_output(model: Any, tokenizer: Any) -> None:
    requests = make_requests(model, tokenizer, 2)
    task = task_of(model, tokenizer, requests)
    run = _Run(task, PRESETS["paper"])
    product = run.product()
    site, seen = task.site, []
    xpatch.apply(model, xpatch.PatchSet(parts=product.parts, gates=product.gates))
    handle = model.get_submodule(site.down).register_forward_hook(lambda m, a, y: seen.append(y))
    ask(model, tokenizer, [requests[0].versions["en"].text])
    handle.remove()
    tokens = seen[0][0]
    # Hooks run in the order they were put on: this one sees the patched output.
    value = run.adaptor.book.values[0]
    assert float((tokens - value).abs().amax(-1).min()) < 1e-3


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_rows_outside_all_balls_keep_their_bits(preset: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 3)
    texts = [item["text"] for items in memory().values() for item in items]
    before = logits_of_model(model, tokenizer, texts)
    patches = train(model, tokenizer, requests, preset=preset, radius=0.01, memory_share=None)
    assert [record.status for record in patches.edits] == ["edited"] * 3
    xpatch.apply(model, patches)
    assert torch.equal(logits_of_model(model, tokenizer, texts), before)


def test_radii_stop_before_what_must_stay() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 4)
    config = PRESETS["default"].model_copy(update={"memory_share": 0.5, "train_languages": "all"})
    run = _Run(task_of(model, tokenizer, requests), config)
    run.product()
    book, rows = run.adaptor.book, run.rows.memory
    distance = torch.cdist(book.keys, run.task.cache.x[rows], compute_mode="donot_use_mm_for_euclid_dist")
    other = run.task.cache.logits[rows].argmax(-1)[None] != torch.tensor(book.labels)[:, None]
    nearest = distance.masked_fill(~other, float("inf")).min(1).values
    assert (book.radii <= 0.5 * nearest + 1e-5).all() and (book.radii > 0).any()


def test_single_edits_go_and_come_together() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 4)
    patches = train(model, tokenizer, requests, memory_share=0.05)
    assert [record.status for record in patches.edits] == ["edited"] * 4
    assert all(record.group is None and record.rows for record in patches.edits)
    texts = [request.versions["en"].text for request in requests]
    before, targets = ask(model, tokenizer, texts), [model.config.label2id[request.target] for request in requests]
    rest = patches.drop("edit-1")
    xpatch.apply(model, rest, name="grace")
    assert ask(model, tokenizer, texts) == [targets[0], before[1], *targets[2:]]
    xpatch.remove(model)
    both = rest + train(model, tokenizer, requests[1:2], memory_share=0.05)
    assert len(both.gates) == 2
    xpatch.apply(model, both)
    assert ask(model, tokenizer, texts) == targets


def test_edits_on_one_key_stay_together_and_the_papers_are_one_group() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    label = (ask(model, tokenizer, ["name1 was born in city1"])[0] + 1) % 3
    requests = [{"id": str(n), "text": f"name1 was born in city{n}", "target": str(label)} for n in (1, 2)]
    wrong = [r for r in requests if ask(model, tokenizer, [r["text"]])[0] != label]
    patches = train(model, tokenizer, wrong, preset="paper", radius=20.0, place="add")
    assert len(patches.parts["values"].keys) == 2  # one key: the second text found it right, or joined it
    joined = [record for record in patches.edits if record.status == "edited"]
    assert len(joined) == 1 or len({record.group for record in joined}) == 1
    whole = train(model, tokenizer, make_requests(model, tokenizer, 2), preset="paper", radius=0.01)
    assert {record.group for record in whole.edits} == {"grace"} and whole.parts["eraser"].count == 65
    with pytest.raises(ConflictError, match="cannot be separated"):
        whole.drop("edit-0")


def test_contradicting_edits_leave_the_later_one() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    answer = ask(model, tokenizer, ["name1 was born in nowhere1"])[0]
    # The same row under two texts: the tokenizer knows neither of their last words.
    requests = [
        {"id": str(step), "text": f"name1 was born in nowhere{step}", "target": str((answer + step) % 3)}
        for step in (1, 2)
    ]
    patches = train(model, tokenizer, requests)
    assert [record.status for record in patches.edits] == ["lost", "edited"]
    assert "a later edit changed its key" in (patches.edits[0].message or "")
    assert len({record.group for record in patches.edits}) == 1 and patches.edits[0].group


def test_a_set_survives_its_folder(tmp_path: Any) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    patches = train(model, tokenizer, make_requests(model, tokenizer, 3), train_languages="all")
    xpatch.save(patches, tmp_path / "grace")
    again = xpatch.load(tmp_path / "grace")
    assert again.fingerprint == patches.fingerprint and again.gates.keys() == patches.gates.keys()
    assert all(torch.equal(again.tensors[name], value) for name, value in patches.tensors.items())


def test_gated_ffns_take_added_values_and_refuse_a_replaced_output() -> None:
    model, tokenizer = model_of("llama"), tokenizer_of("llama")
    requests = make_requests(model, tokenizer, 2)
    patches = train(model, tokenizer, requests)
    assert [record.status for record in patches.edits] == ["edited"] * 2
    xpatch.apply(model, patches)
    texts = [request.versions["en"].text for request in requests]
    assert ask(model, tokenizer, texts) == [model.config.label2id[request.target] for request in requests]
    xpatch.remove(model)
    with pytest.raises(MismatchError, match="is gated; replacing its output knows FFNs of two linears"):
        train(model, tokenizer, requests, preset="paper")
