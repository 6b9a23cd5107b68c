"""FT, FT-L and CaliNet on language models: generation says the target with the patch applied, and the ledger knows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xpatch
from tests.editors.lm import make_requests, memory, model_of, says, tokenizer_of
from tests.editors.test_edit import digest
from xpatch.errors import MismatchError
from xpatch.models.anatomy import final_ffn
from xpatch.patches.types import PatchSet

# Random models: bigger steps than trained ones need.
QUICK: dict[str, dict[str, Any]] = {
    "ft": {"learning_rate": 3e-3, "steps": 300, "memory_weight": 0.1},
    "ft-l": {"learning_rate": 1e-2, "steps": 300, "box": 0.5, "memory_weight": 0.1},
    "calinet": {"steps": 300, "learning_rate": 0.02, "memory_weight": 0.1},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def train(model: Any, tokenizer: Any, requests: Any, method: str, **options: Any) -> PatchSet:
    settings = {"memory": memory(), "progress": False, **QUICK[method], **options}
    return xpatch.edit(model, tokenizer, requests, method, **settings)


@pytest.mark.parametrize("kind", ["gpt2", "bart", "t5", "bert"])
@pytest.mark.parametrize("method", list(QUICK))
def test_generation_says_the_target(method: str, kind: str) -> None:
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    requests, before = make_requests(kind, 2), digest(model)
    patches = train(model, tokenizer, requests, method, train_languages="all")
    assert digest(model) == before
    xpatch.apply(model, patches, tokenizer=tokenizer)
    edited = 0
    for request, record in zip(requests, patches.edits, strict=True):
        texts = [(version.text, request.target_of(code) or "") for code, version in request.versions.items()]
        texts = [(text.replace("[MASK]", "[MASK] [MASK]"), target) for text, target in texts]
        right = all(says(model, tokenizer, text).startswith(target) for text, target in texts)
        assert right == (record.status == "edited"), record
        edited += right
        if right:
            assert record.message == "right in en, de, xx, greedy decoding says the target"
    xpatch.remove(model)
    assert edited and digest(model) == before
    site = final_ffn(model)
    places = {"ft": {site.up, site.down}, "ft-l": {site.down}, "calinet": {site.name}}[method]
    assert {part.site for part in patches.parts.values()} == places


@pytest.mark.parametrize("method", list(QUICK))
def test_what_generation_does_not_say_has_failed(method: str) -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    model.generation_config.suppress_tokens = tokenizer("new")["input_ids"]
    request = {"id": "a", "text": "name1 was born in", "target": "new city1"}
    (record,) = train(model, tokenizer, [request], method).edits
    assert record.status == "failed"
    assert "right token by token, but greedy decoding says '" in (record.message or "")


def test_a_rank_says_what_it_moved_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    requests = make_requests("gpt2", 2)
    whole = train(model, tokenizer, requests, "ft", rank=4)
    monkeypatch.setattr("xpatch.editors.rows.LOGITS", 300)  # five rows at once
    parts = train(model, tokenizer, requests, "ft", rank=4)
    assert whole.fingerprint == parts.fingerprint
    assert "cut to rank 4" in (whole.edits[0].message or "")


@pytest.mark.parametrize(
    ("method", "kind", "options", "said"),
    [
        ("ft", "llama", {}, "is gated; fine-tuning knows FFNs of two linears; use method 't-patcher' or 'mpn'"),
        ("ft-l", "mt5", {}, "that of the final FFN"),
        ("ft-l", "gpt2", {"layer": 0}, "leave layer out"),
    ],
)
def test_what_cannot_be_trained_says_why(method: str, kind: str, options: dict[str, Any], said: str) -> None:
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    with pytest.raises(MismatchError, match=said):
        train(model, tokenizer, make_requests(kind, 1), method, **options)


@pytest.mark.parametrize("method", ["grace", "mpn-masked", "ke", "mend"])
def test_methods_for_classifiers_name_those_for_language_models(method: str) -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    with pytest.raises(MismatchError, match="calinet, ft, ft-l, mpn, mpn-only, t-patcher"):
        xpatch.edit(model, tokenizer, make_requests("gpt2", 1), method, progress=False)
