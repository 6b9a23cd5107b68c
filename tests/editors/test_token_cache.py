"""Rows of tokens: shared where the context is the same, exact under teacher forcing, and in the order asked for."""

from __future__ import annotations

import pytest
import torch

from tests.editors.lm import CAUSAL, MASKED, SEQ2SEQ, make_requests, memory, model_of, tokenizer_of
from xpatch.editors.subject import LanguageModel
from xpatch.editors.t_patcher.neurons import Neurons
from xpatch.editors.task import Edit, Wording
from xpatch.editors.token_cache import TokenCache, model_inputs
from xpatch.models.lm_decoding import Greedy
from xpatch.models.surgery import Surgery
from xpatch.patches.requests import Probe

KINDS = (*CAUSAL, *SEQ2SEQ, *MASKED)


def bench_of(kind: str) -> tuple[TokenCache, Greedy, list[Edit], LanguageModel]:
    from xpatch.models.lm_heads import lm_kind

    model = model_of(kind)
    spoken = lm_kind(model)
    assert spoken is not None
    subject = LanguageModel(model, tokenizer_of(kind), spoken)
    edits = [subject.resolve(request, None) for request in make_requests(kind)]
    bench = subject.bench(edits)
    assert isinstance(bench.cache, TokenCache) and isinstance(bench.decoding, Greedy)
    return bench.cache, bench.decoding, edits, subject


@pytest.mark.parametrize("kind", KINDS)
def test_patched_rows_are_the_patched_forward(kind: str) -> None:
    """A patch at the final FFN changes no input of it, at any token: what is trained on is what will be computed."""
    cache, greedy, edits, subject = bench_of(kind)
    wordings = [wording for edit in edits for wording in (*edit.versions, *edit.rephrases)]
    asked = [cache.asked(wording) for wording in wordings]
    cache.fill(lambda *event: None)
    width = cache.x.shape[1]
    neurons = Neurons(torch.randn(5, width), torch.randn(5), torch.randn(5, width), torch.zeros(5), "gelu")
    head = subject.bench(edits).head
    for wording, rows in zip(wordings, asked, strict=True):
        said = subject._prompts.said(wording.probe, wording.target or "", wording.language)
        with torch.no_grad(), greedy._patched(neurons.output):
            logits = subject._model(**model_inputs([said], subject._model.device)).logits[0, list(said.positions)]
            index = [row for row, _ in rows]
            mine = head.tail(cache.base[index] + neurons.output(cache.x[index]), cache.residual[index])
        torch.testing.assert_close(mine, logits, rtol=1e-3, atol=1e-3)
        assert [label for _, label in rows] == list(said.labels)


def test_equal_contexts_are_one_row() -> None:
    cache, _, _, _ = bench_of("gpt2")
    one = cache.asked(Wording(Probe(text="name1 was born in"), -1, "en", "new city1"))
    two = cache.asked(Wording(Probe(text="name1 was born in"), -1, "de", "new city2"))
    longer = cache.asked(Wording(Probe(text="name1 was born in new"), -1, "en", "city1"))
    assert [row for row, _ in one] == [row for row, _ in two] and longer[0][0] == one[1][0]
    assert len(cache) == 2


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart", "bert"])
def test_memory_holds_every_token_that_says_something(kind: str) -> None:
    """Not a text's first token; of a decoder beside an encoder the first one too, for the answer's first word is said there."""
    cache, _, _, _ = bench_of(kind)
    texts = [Probe(text=text) for text in memory()["en"]]
    rows = cache.want([*texts, Probe(text="name1 was", target="city1")])
    places = [place for _, place in cache._places]
    assert rows and (0 in places) == (kind in SEQ2SEQ)
    assert len(cache.want(texts, 3)) == 3
    cache.fill(lambda *event: None)
    assert len(cache.x) == len(cache)
    again = cache.want([Probe(text=text) for text in memory()["de"]])
    before = cache.x.clone()
    cache.fill(lambda *event: None)
    assert torch.equal(cache.x[: len(before)], before) and max(again) < len(cache.x)
    assert cache.logits.shape == (len(cache), 60)


@pytest.mark.parametrize("target", ["city1", None])
def test_memory_leaves_out_what_generation_forces(target: str | None) -> None:
    cache, _, _, subject = bench_of("bart")
    subject._model.generation_config.forced_bos_token_id = 1  # [CLS], which the tokenizer's targets begin with
    try:
        assert cache.want([Probe(text="name1 was", target=target)])
        assert all(place > 0 for _, place in cache._places)
    finally:
        subject._model.generation_config.forced_bos_token_id = None


def test_an_encoders_memory_is_the_models_own_answer() -> None:
    _, greedy, _, subject = bench_of("bart")
    model, tokenizer = subject._model, subject._tokenizer
    ids = tokenizer("name20 was born in")["input_ids"]
    (answer,) = greedy.answers([tuple(ids)], 6)
    made = model.generate(torch.tensor([ids]), do_sample=False, num_beams=1, max_new_tokens=6)[0].tolist()
    assert list(answer) == made[: len(answer)] and len(answer) >= min(len(made), 6)
    assert answer[0] == model.config.decoder_start_token_id


def test_greedy_decoding_is_asked_with_the_patches_and_leaves_no_hook() -> None:
    _, greedy, edits, subject = bench_of("gpt2")
    wordings = [edit.versions[0] for edit in edits]
    plain = greedy.instead(wordings)
    assert all(isinstance(text, str) for text in plain)
    assert greedy.instead(wordings, torch.zeros_like) == plain
    assert greedy.instead(wordings, lambda x: 50.0 * torch.arange(32.0).expand_as(x)) != plain
    said = [Wording(wording.probe, -1, "en", text) for wording, text in zip(wordings, plain, strict=True)]
    assert greedy.instead(said) == [None] * len(said)
    assert isinstance(greedy._patched(None), Surgery)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in subject._model.modules())
