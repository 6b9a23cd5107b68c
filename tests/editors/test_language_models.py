"""Transformer-Patcher and MPN on language models: greedy decoding says the target afterwards, and nothing else has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xpatch
from tests.editors.lm import (
    CAUSAL,
    CITIES,
    MASKED,
    NAMES,
    QUICK,
    SEQ2SEQ,
    make_requests,
    memory,
    model_of,
    says,
    tokenizer_of,
)
from tests.editors.test_edit import digest
from xpatch.errors import FormatError, MismatchError
from xpatch.models.anatomy import final_ffn
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import PatchSet

KINDS = (*CAUSAL, *SEQ2SEQ, *MASKED)


def train(model: Any, tokenizer: Any, requests: Any, method: str = "mpn", **options: Any) -> PatchSet:
    return xpatch.edit(model, tokenizer, requests, method, **{"memory": memory(), **QUICK, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_generation_says_the_target_in_every_language(kind: str) -> None:
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    requests = make_requests(kind)
    before, state = digest(model), torch.random.get_rng_state()
    attributes = [sorted(vars(module)) for module in model.modules()]
    settings = model.generation_config.to_dict() if kind not in MASKED else None
    patches = train(model, tokenizer, requests)
    assert digest(model) == before and attributes == [sorted(vars(module)) for module in model.modules()]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert settings is None or model.generation_config.to_dict() == settings
    assert [record.status for record in patches] == ["edited"] * 3, [record.message for record in patches]
    (part,) = patches.parts.values()
    assert part.site == final_ffn(model).name and part.activation == "relu"
    assert all(record.message == "right in en, de, xx, greedy decoding says the target" for record in patches)
    texts = [
        (version.text, request.target_of(code)) for request in requests for code, version in request.versions.items()
    ]
    texts = [(text.replace("[MASK]", "[MASK] [MASK]"), target) for text, target in texts]
    first = [says(model, tokenizer, text) for text, _ in texts]
    xpatch.apply(model, patches, tokenizer=tokenizer)
    for text, target in texts:
        assert says(model, tokenizer, text).startswith(target), text
    xpatch.remove(model)
    assert [says(model, tokenizer, text) for text, _ in texts] == first and digest(model) == before


@pytest.mark.parametrize("limit", [0, 4])
def test_edits_one_after_the_other_hold_beside_a_sample_of_earlier_rows(limit: int) -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    patches = train(model, tokenizer, make_requests("gpt2"), chunk=1, mates_per_step=limit, early_stop=limit > 0)
    assert [record.status for record in patches] == ["edited"] * 3, [record.message for record in patches]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_equal_seeds_give_equal_bytes(kind: str) -> None:
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    torch.manual_seed(1)
    first = train(model, tokenizer, make_requests(kind), steps=20)
    torch.manual_seed(2)
    assert train(model, tokenizer, make_requests(kind), steps=20).fingerprint == first.fingerprint
    assert train(model, tokenizer, make_requests(kind), steps=20, seed=1).fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_the_paper_preset_gives_a_neuron_to_each_wrong_token(kind: str) -> None:
    """One text, each of whose tokens is wrong: as many neurons, with the FFN's own activation."""
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    request = {"id": "a", "text": "name1 was born in", "target": "new city1 new city1 new city2 new city3"}
    options = {"preset": "paper", "memory_weight": 0.5, "rounds": 0, "steps": 200}
    patches = train(model, tokenizer, [request], "t-patcher", **options)
    part = patches.parts["neurons"]
    assert part.activation == final_ffn(model).activation and part.count == 5  # at most
    settings = patches.edits[0].hyperparameters
    assert (settings["label_smoothing"], settings["memory_margin"], settings["max_tokens"]) == (0.1, 0.0, 5)
    assert train(model, tokenizer, [request], "t-patcher", **options, max_tokens=2).parts["neurons"].count == 2


def test_mpn_only_trains_one_other_language_and_t_patcher_none() -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    for method, languages in (("t-patcher", 1), ("mpn-only", 2)):
        patches = train(model, tokenizer, make_requests("gpt2", 2), method)
        for record in patches:
            assert record.status == "edited"
            assert len((record.message or "").split(", greedy")[0].removeprefix("right in ").split(", ")) == languages


def test_already_said_needs_nothing() -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    said = " ".join(says(model, tokenizer, "name1 was born in").split()[:2])
    patches = train(model, tokenizer, [{"id": "a", "text": "name1 was born in", "target": said}])
    assert patches.edits[0].status == "already-right" and not patches.parts
    assert patches.edits[0].message == "right in en before editing, greedy decoding says the target"


@pytest.mark.parametrize("already", [False, True])
def test_what_generation_does_not_say_has_failed(already: bool) -> None:
    """The model's own settings forbid a word: teacher forcing cannot see it, the status does."""
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    target = " ".join(says(model, tokenizer, "name1 was born in").split()[:2]) if already else "new city1"
    model.generation_config.suppress_tokens = tokenizer(target)["input_ids"][:1]
    patches = train(model, tokenizer, [{"id": "a", "text": "name1 was born in", "target": target}])
    assert patches.edits[0].status == "failed" and not patches.parts and not patches.edits[0].rows
    assert "right token by token, but greedy decoding says '" in (patches.edits[0].message or "")
    kept = train(model, tokenizer, [{"id": "a", "text": "name1 was born in", "target": target}], keep_failed=True)
    assert kept.edits[0].status == "failed" and bool(kept.parts) is not already


def test_rejected_requests_of_language_models_say_why() -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    good = {"id": "good", "text": "name1 was born in", "target": "new city1"}
    bad = [
        {"id": "none", "text": "name2 was born in"},
        {"id": "blank", "text": "name2 was born in", "target": "  "},
        {"id": "unknown", "text": "name2 was born in", "target": "Paris"},
        {"id": "long", "text": "name2 was born in", "target": " ".join(CITIES * 3)},
        {"id": "one", "text": "name3 was born in", "target": "new city1"},
        {"id": "two", "text": "name3 was born in", "target": "new city2"},
        {"id": "again", "text": "name1 was born in", "target": "new city1"},
    ]
    patches = train(model, tokenizer, [good, *bad])
    said = {record.id: record.message or "" for record in patches if record.status == "rejected"}
    assert list(said) == [request["id"] for request in bad]
    words = {"none": "no target", "blank": "no target", "unknown": "no tokens for the target 'Paris'", "long": "36 tokens",
             "one": "contradicts 'two'", "two": "contradicts 'one'", "again": "duplicate of 'good'"}  # fmt: skip
    assert all(word in said[id] for id, word in words.items()), said
    assert patches.edit("good").status == "edited"
    masked = {"id": "a", "text": "name1 [MASK] born [MASK] in [MASK]", "target": "new city1"}
    record = train(model_of("bert"), tokenizer_of("bert"), [masked]).edits[0]
    assert record.status == "rejected" and "3 masks" in (record.message or "") and "2 tokens" in (record.message or "")


def test_locality_probes_and_bundled_claims_are_memory() -> None:
    for kind in ("gpt2", "bart"):
        model, tokenizer = model_of(kind), tokenizer_of(kind)
        request = make_requests(kind, 1)[0]
        data = request.model_dump()
        data["versions"]["en"]["locality"] = [NAMES[9], {"text": NAMES[8], "target": CITIES[8]}]
        request = EditRequest.model_validate(data)
        patches = train(model, tokenizer, [request], memory=None, memory_rows=40, steps=3, rescue=False)
        assert len(patches) == 1


def test_long_texts_are_cut_and_say_so() -> None:
    for kind in ("gpt2", "t5"):
        text = " ".join(NAMES[:12] * 3) + " was born in"
        record = train(
            model_of(kind), tokenizer_of(kind), [{"id": "a", "text": text, "target": "new city1"}], steps=3
        ).edits[0]
        assert (record.message or "").endswith("(text cut at the model's length limit)"), record.message


def test_methods_and_models_that_do_not_go_together() -> None:
    request = [{"id": "a", "text": "name1", "target": "new"}]
    with pytest.raises(
        MismatchError,
        match="'grace' edits classifier models, found GPT2LMHeadModel, a causal model; methods for it: calinet, ft",
    ):
        xpatch.edit(model_of("gpt2"), tokenizer_of("gpt2"), request, "grace")
    with pytest.raises(FormatError, match="no preset 'nothing'"):
        train(model_of("gpt2"), tokenizer_of("gpt2"), request, preset="nothing")
    albert = tiny_albert()
    with pytest.raises(MismatchError, match="runs 2 times in one forward"):
        train(albert, tokenizer_of("bert"), [{"id": "a", "text": "name1 [MASK]", "target": "new"}])


def tiny_albert() -> Any:
    import transformers

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "embedding_size": 16,
    }
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(vocab_size=60, **sizes)).eval()


def test_edits_of_language_models_can_be_taken_out() -> None:
    model, tokenizer = model_of("llama"), tokenizer_of("llama")
    requests = make_requests("llama")
    patches = train(model, tokenizer, requests).drop("edit-1")
    xpatch.apply(model, patches, tokenizer=tokenizer)
    said = [
        says(model, tokenizer, request.versions["en"].text).startswith(request.target or "?") for request in requests
    ]
    assert said == [True, False, True]
