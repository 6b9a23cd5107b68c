"""The recipe that makes the verifier, in small: tokenizer, masked batches, checkpoints, a few steps."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers")
from xpatch.zoo.verifier import checkpoint, pretrain
from xpatch.zoo.verifier.classify import best_shift, claims_batch
from xpatch.zoo.verifier.corpus import MASK, Corpus
from xpatch.zoo.verifier.data import LANGUAGES, facts, sentence
from xpatch.zoo.verifier.tokenizer import build


@pytest.fixture(scope="module")
def tokenizer():
    return build()


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return Corpus(tokenizer, seed=0)


def test_tokenizer_keeps_labels_short_in_every_script(tokenizer):
    for language in LANGUAGES:
        texts = [sentence(f.relation, language, 0, *f.labels[language]) for f in facts()[::50]]
        lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
        assert sum(lengths) / len(lengths) < 18
        assert not any(tokenizer.unk_token_id in tokenizer(text)["input_ids"] for text in texts)


def test_spans_hold_subject_and_object(tokenizer, corpus):
    for (index, language, _), made in list(corpus.sentences.items())[::997]:
        plain = lambda text: tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).replace(" ", "")  # noqa: E731
        for span, label in zip((made.subject, made.object), corpus.facts[index].labels[language], strict=True):
            assert plain(label) in tokenizer.decode(made.ids[slice(*span)]).replace(" ", "")


@pytest.mark.parametrize(("kind", "length"), [("mono", 16), ("pair", 32)])
def test_batches_mask_what_they_ask_for(corpus, kind, length):
    batch = getattr(corpus, kind)(32, length)
    assert batch["input_ids"].shape == (32, length)
    asked = batch["target"] != -100
    at = batch["index"][asked]
    assert asked.any() and (batch["input_ids"].flatten()[at] == MASK).float().mean() > 0.5
    assert (batch["attention_mask"].flatten()[at] == 1).all()


def test_claims_batches_are_balanced(tokenizer):
    batch, labels = claims_batch(tokenizer, random.Random(0), 16)
    assert labels.sum() == 8 and len(batch["input_ids"]) == 16


def test_threshold_is_the_one_with_most_right():
    scores = torch.tensor([-1.5, -1.2, -0.4, 1.0]), torch.tensor([False, False, True, True])
    assert 0.4 < best_shift({"en": scores}) <= 1.2


@pytest.mark.slow
def test_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    small = lambda vocabulary: _small(vocabulary)  # noqa: E731
    monkeypatch.setattr(pretrain, "config", small)
    first = pretrain.pretrain(tmp_path, steps=3, peak=1e-3, compiled=False)
    optimizer = torch.optim.AdamW(first.parameters(), fused=True)
    fresh = type(first)(first.config)
    assert checkpoint.load(tmp_path, fresh, optimizer) == 3
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert len(optimizer.state_dict()["state"]) == len(list(first.parameters()))
    assert pretrain.pretrain(tmp_path, steps=4, peak=1e-3, compiled=False) is not None


_CONFIG = pretrain.config


def _small(vocabulary):
    made = _CONFIG(vocabulary)
    made.hidden_size, made.num_hidden_layers, made.num_attention_heads, made.intermediate_size = 32, 1, 2, 64
    return made
