"""Editing with trained editors: statuses, ranks by owner, each edit from the base, errors that say what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from tests.editors.conftest import ask, make_requests, model_of, tokenizer_of
from tests.editors.hyper.conftest import SMALL, facts, gradients
from tests.editors.test_edit import digest
from xpatch.errors import FormatError, MismatchError
from xpatch.patches.types import LowRankDelta

METHODS = ("ke", "mend", "lime-ke", "lime-mend")
# Edits of one layer with an outright step against the gradient: they take on a random model, trained or not.
STRONG = {"layers": 1, "steps": 1, "validate_every": 1, "validation_edits": 2}
STRENGTH = {"mend": {"alpha": -0.03}, "lime-mend": {"alpha": -0.03}, "ke": {}, "lime-ke": {}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`trained(method, kind, **settings)` -> an editor's folder, trained once."""
    done: dict[Any, Path] = {}

    def folder(method: str, kind: str = "bert", **settings: Any) -> Path:
        key = (method, kind, tuple(settings.items()))
        if key not in done:
            torch.set_num_threads(1)
            done[key] = tmp_path_factory.mktemp("editors") / f"{method}-{kind}-{len(done)}"
            options = {**SMALL[method], **STRONG, **STRENGTH[method], **settings}
            xpatch.train_editor(
                model_of(kind), tokenizer_of(kind), facts(), method, out=done[key], progress=False, **options
            )
        return done[key]

    return folder


def edit(model: Any, tokenizer: Any, requests: Any, method: str, editor: Any, **options: Any) -> Any:
    return xpatch.edit(model, tokenizer, requests, method=method, editor=editor, progress=False, memory={}, **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_bit_identical_and_equal_calls_give_equal_bytes(trained: Any, method: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer)
    before, state = digest(model), torch.random.get_rng_state()
    first = edit(model, tokenizer, requests, method, trained(method), preset="paper")
    assert digest(model) == before and torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    again = edit(model, tokenizer, requests, method, trained(method), preset="paper")
    assert first.fingerprint == again.fingerprint
    assert [record.id for record in first.edits] == [request.id for request in requests]
    assert all(isinstance(part, LowRankDelta) for part in first.parts.values())


def test_statuses_are_what_the_patched_model_answers(trained: Any, kind: str, model: Any, tokenizer: Any) -> None:
    requests = make_requests(model, tokenizer, 6)
    patches = edit(model, tokenizer, requests, "mend", trained("mend", kind))
    statuses = [record.status for record in patches.edits]
    assert statuses.count("edited") >= 1, [record.message for record in patches.edits]
    xpatch.apply(model, patches, name="all")
    for request, record in zip(requests, patches.edits, strict=True):
        right = ask(model, tokenizer, [request.versions["en"].text]) == [model.config.label2id[request.target]]
        assert right == (record.status == "edited") or record.status == "failed"
        assert bool(record.rows) == (record.status in ("edited", "lost")), record.message
    xpatch.remove(model)


@pytest.mark.parametrize("method", METHODS)
def test_each_edit_is_made_from_the_base_and_owns_its_ranks(trained: Any, method: str) -> None:
    """Taken out of the set, an edit is the one that is made alone."""
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 3)
    patches = edit(model, tokenizer, requests, method, trained(method), preset="paper")
    tokens = len(tokenizer(requests[1].versions["en"].text)["input_ids"])
    rank = tokens + 1 if "ke" in method else tokens
    for number, request in enumerate(requests):
        alone = edit(model, tokenizer, [request], method, trained(method), preset="paper")
        chosen = patches.select([request.id])
        assert chosen.parts.keys() == alone.parts.keys()
        for name, part in chosen.parts.items():
            assert part.count <= rank and part.count == len(patches.edits[number].rows[name])
            dense = part.up @ part.down
            assert torch.allclose(dense, alone.parts[name].up @ alone.parts[name].down, atol=1e-5, rtol=1e-4)
    assert all(record.group is None for record in patches.edits)


def test_mends_change_is_along_the_gradient(trained: Any) -> None:
    """An untrained MEND behind an affine-free LayerNorm is a step along the normalised gradient: the sign is the descent's."""
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    request = make_requests(model, tokenizer, 1)[0]
    patches = edit(model, tokenizer, [request], "lime-mend", trained("lime-mend"), preset="paper")
    label = model.config.label2id[request.target]
    expected = gradients(model, tokenizer, request.versions["en"].probe, label, list(patches.parts))
    for name, part in patches.parts.items():
        assert float(((part.up @ part.down) * expected[name]).sum()) < 0


@pytest.mark.parametrize("method", METHODS)
def test_already_right_costs_nothing(trained: Any, method: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    answer = ask(model, tokenizer, ["name1 was born in city1"])[0]
    request = {"id": "1", "text": "name1 was born in city1", "target": str(answer)}
    patches = edit(model, tokenizer, [request], method, trained(method))
    assert not patches.parts and patches.edits[0].status == "already-right"
    assert edit(model, tokenizer, [request], method, trained(method), preset="paper").parts  # the papers edit it, too


def test_all_versions_may_decide(trained: Any) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    answers = dict.fromkeys(("en", "de", "xx"), 0)
    requests = make_requests(model, tokenizer, 6)
    for request in requests:
        texts = [request.versions[language].text for language in answers]
        wrong = [a != model.config.label2id[request.target] for a in ask(model, tokenizer, texts)]
        record = edit(model, tokenizer, [request], "mend", trained("mend"), decide="all").edits[0]
        assert (record.status == "already-right") == (not any(wrong))


def test_pairs_and_texts_without_padding(trained: Any) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 3, pair=True)
    patches = edit(model, tokenizer, requests, "mend", trained("mend"), preset="paper")
    assert len(patches) == 3 and patches.parts
    decoder, words = model_of("gpt2"), tokenizer_of("gpt2")
    folder = trained("mend", "gpt2")
    asked = make_requests(decoder, words, 3)
    batched = edit(decoder, words, asked, "mend", folder, preset="paper")
    words.pad_token = None
    try:
        single = edit(decoder, words, asked, "mend", folder, preset="paper")
    finally:
        words.pad_token = "[PAD]"
    for name, part in batched.parts.items():
        assert torch.allclose(part.up @ part.down, single.parts[name].up @ single.parts[name].down, atol=1e-5)


def test_errors_say_what_to_do(trained: Any, tmp_path: Path) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 1)
    with pytest.raises(FormatError, match="needs a trained editor.*train_editor"):
        edit(model, tokenizer, requests, "mend", None)
    with pytest.raises(FormatError, match="holds no trained editor"):
        edit(model, tokenizer, requests, "mend", tmp_path)
    with pytest.raises(FormatError, match="expected one of method 'ke', found 'mend'"):
        edit(model, tokenizer, requests, "ke", trained("mend"))
    other = model_of("bert")
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(MismatchError, match="trained for another base.*weights"):
        edit(other, tokenizer, requests, "mend", trained("mend"))
    german = {"id": "1", "text": "name1 wurde in city1 geboren", "target": "0", "language": "de"}
    answer = ask(model, tokenizer, [german["text"]])[0]
    german["target"] = str((answer + 1) % 3)
    with pytest.raises(MismatchError, match="'1' is in 'de', for which the editor has no mask; its languages: en"):
        edit(model, tokenizer, [german], "lime-mend", trained("lime-mend"))
    copy = tmp_path / "copy"
    shutil.copytree(trained("mend"), copy)
    (copy / "editor.safetensors").unlink()
    with pytest.raises(FormatError, match=r"editor\.safetensors is missing"):
        edit(model, tokenizer, requests, "mend", copy)


def test_the_base_of_the_set_names_every_touched_layer(trained: Any) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    patches = edit(
        model, tokenizer, make_requests(model, tokenizer, 1), "mend", trained("mend", layers=2), preset="paper"
    )
    assert set(patches.base.touched) == {"bert.encoder.layer.0", "bert.encoder.layer.1"}
