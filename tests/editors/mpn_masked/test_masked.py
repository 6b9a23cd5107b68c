"""Masks before neurons: what they are, how they are served, and that folding one gives the same neurons."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xpatch
from tests.editors.conftest import QUICK, make_requests, memory, model_of, tokenizer_of
from xpatch.editors.cache import FeatureCache
from xpatch.editors.mpn_masked.rows import MaskedRows, Spoken
from xpatch.models.heads import head_of
from xpatch.patches.masks import fold_language

LANGUAGES = ("en", "de", "xx")


def train(model: Any, tokenizer: Any, requests: Any, **options: Any) -> xpatch.PatchSet:
    settings = {**QUICK["mpn-masked"], **options}
    return xpatch.edit(model, tokenizer, requests, "mpn-masked", memory=memory(), progress=False, **settings)


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any, xpatch.PatchSet]:
    torch.set_num_threads(1)
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 4)
    return model, tokenizer, requests, train(model, tokenizer, requests)


def logits(model: Any, tokenizer: Any, texts: list[str], patches: Any = None, **rows: Any) -> torch.Tensor:
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    if patches is not None:
        xpatch.apply(model, patches, name="fixes", tokenizer=tokenizer)
    try:
        with torch.no_grad(), xpatch.rows(**rows):
            return model(**inputs).logits
    finally:
        if patches is not None:
            xpatch.remove(model)


def test_every_language_but_the_requests_own_has_a_mask_of_its_own(made: Any) -> None:
    *_, patches = made
    mask = patches.masks["languages"]
    assert mask.languages == LANGUAGES and patches.parts["neurons"].mask == "languages"
    assert torch.equal(mask.inner[0], torch.ones_like(mask.inner[0]))
    assert all(float((row - 1).abs().mean()) > 1e-3 for row in mask.inner[1:])
    assert not torch.allclose(mask.inner[1], mask.inner[2], atol=1e-3)
    assert torch.equal(mask.outer, torch.ones_like(mask.outer))


def test_edits_are_right_when_each_row_names_its_language(made: Any) -> None:
    model, tokenizer, requests, patches = made
    edited = [record.id for record in patches.edits if record.status == "edited"]
    assert len(edited) >= 3
    for request in requests:
        if request.id in edited:
            found = logits(
                model, tokenizer, [request.versions[k].text for k in LANGUAGES], patches, languages=LANGUAGES
            )
            assert found.argmax(-1).tolist() == [model.config.label2id[request.target]] * 3


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_folded_mask_is_the_mask(made: Any, language: str) -> None:
    model, tokenizer, requests, patches = made
    texts = [request.versions[k].text for request in requests for k in LANGUAGES]
    masked = logits(model, tokenizer, texts, patches, languages=language)
    folded = fold_language(patches, language)
    assert not folded.masks and folded.edits == patches.edits
    torch.testing.assert_close(logits(model, tokenizer, texts, folded), masked, rtol=1e-5, atol=1e-4)
    if language == "xx":  # and it is not what another language gets
        assert float((logits(model, tokenizer, texts, folded) - logits(model, tokenizer, texts)).abs().max()) > 1e-2
        assert float((masked - logits(model, tokenizer, texts, patches, languages="en")).abs().max()) > 1e-3


def test_folding_at_edit_time_is_folding_afterwards(made: Any) -> None:
    model, tokenizer, requests, patches = made
    found, wanted = train(model, tokenizer, requests, fold="xx"), fold_language(patches, "xx")
    assert not found.masks
    for name, tensor in wanted.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    with pytest.raises(xpatch.MismatchError, match="en, de, xx"):
        train(model, tokenizer, requests, fold="fr")


@pytest.mark.filterwarnings("ignore:patch set .* has language masks")
def test_no_language_and_an_unknown_one_are_served_as_the_requests_own(made: Any) -> None:
    model, tokenizer, requests, patches = made
    texts = [request.versions["de"].text for request in requests]
    own = logits(model, tokenizer, texts, patches, languages="en")
    for rows in ({}, {"languages": "sw"}):
        torch.testing.assert_close(logits(model, tokenizer, texts, patches, **rows), own, rtol=1e-6, atol=1e-6)


def test_evaluation_asks_each_text_in_its_language(made: Any) -> None:
    model, tokenizer, requests, patches = made
    report = xpatch.evaluate(model, tokenizer, requests, patches)
    for language in LANGUAGES:
        texts = [request.versions[language].text for request in requests]
        wanted = logits(model, tokenizer, texts, patches, languages=language).argmax(-1).tolist()
        assert list(report.predictions["edit"][language].after) == wanted


def test_too_few_parallel_edits_give_the_neurons_of_mpn() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 2)
    patches = train(model, tokenizer, requests, mask_least=3)
    plain = xpatch.edit(model, tokenizer, requests, "mpn", memory=memory(), progress=False, **QUICK["mpn"])
    assert not patches.masks
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in patches.tensors.items())


def test_equal_arguments_give_equal_masks_and_a_saved_set_is_the_same(made: Any, tmp_path: Any) -> None:
    model, tokenizer, requests, patches = made
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    again = train(model, tokenizer, requests)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in patches.tensors.items())
    xpatch.save(patches, tmp_path / "fixes")
    assert xpatch.load(tmp_path / "fixes").fingerprint == patches.fingerprint
    other = train(model, tokenizer, requests, seed=1)
    assert not torch.equal(other.masks["languages"].inner, patches.masks["languages"].inner)


def test_rows_are_masked_by_the_language_of_their_text() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    cache = FeatureCache(model, tokenizer, head_of(model).site)
    rows = MaskedRows(cache, ("en", "de"))
    texts = [("name1 qo city1", "en"), ("name1 qo city1", "de"), ("name2 qo city2", "zz")]
    assert rows.want(Spoken(text=text, language=language) for text, language in texts) == [0, 1, 2]
    rows.fill(lambda *event: None)
    assert len(cache) == 2 and len(rows) == 3  # a text that two languages share is read once
    inner = torch.rand(2, 32)
    rows.mask(inner)
    plain = cache.x[[0, 0, 1]]
    assert torch.equal(rows.x, torch.stack((plain[0] * inner[0], plain[1] * inner[1], plain[2])))
    assert torch.equal(rows.base, cache.base[[0, 0, 1]]) and torch.equal(rows.logits, cache.logits[[0, 0, 1]])
