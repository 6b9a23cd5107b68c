"""Texts of random tokens: what they are made of, and that the default MPN patch is silent on such texts and others unlike its memory."""

from __future__ import annotations

import random

import pytest

from tests.editors.conftest import make_requests, memory, model_of, tokenizer_of
from xpatch.editors import edit
from xpatch.editors.cache import FeatureCache
from xpatch.editors.t_patcher.noise import noise
from xpatch.models.heads import head_of
from xpatch.patches.requests import Probe


@pytest.mark.parametrize("kind", ["bert", "xlmr", "gpt2"])
@pytest.mark.parametrize("pairs", [False, True])
def test_texts_can_be_read_and_follow_the_seed(kind, pairs):
    tokenizer = tokenizer_of(kind)
    found = noise(tokenizer, 60, random.Random(3), pairs=pairs)
    assert 30 < len(found) <= 60 and len({probe.text for probe in found}) > 20
    assert all((probe.text_pair is not None) == pairs for probe in found)
    assert found == noise(tokenizer, 60, random.Random(3), pairs=pairs)
    assert found != noise(tokenizer, 60, random.Random(4), pairs=pairs)
    assert all(tokenizer(probe.text)["input_ids"] for probe in found)


def test_of_a_large_vocabulary_a_part_is_decoded(monkeypatch):
    monkeypatch.setattr("xpatch.editors.t_patcher.noise._TOKENS", 12)
    tokenizer = tokenizer_of("bert")
    words = {word for probe in noise(tokenizer, 200, random.Random(0)) for word in probe.text.split()}
    assert 1 < len(words) <= 13 < len(tokenizer)  # the sample and the unknown token


def test_none_are_drawn_where_none_are_asked_for():
    assert noise(tokenizer_of("bert"), 0, random.Random(0)) == []


def test_every_second_text_is_of_one_script():
    class Tokenizer:
        all_special_ids = (0, 1)
        unk_token_id = 1

        def __init__(self):
            self._words = [
                "[CLS]",
                "[UNK]",
                *(chr(97 + i) for i in range(20)),
                *(chr(0x430 + i) for i in range(20)),
                "7",
            ]

        def __len__(self):
            return len(self._words)

        def decode(self, tokens):
            return " ".join(self._words[token] for token in tokens)

    found = [probe.text.split() for probe in noise(Tokenizer(), 400, random.Random(0))]
    kinds = [{"latin" if word < "{" else "cyrillic" for word in words if word not in ("7", "[UNK]")} for words in found]
    assert all(len(kind) <= 1 for kind in kinds[1::2]) and any(len(kind) == 2 for kind in kinds[::2])
    assert {"latin"} in kinds[1::2] and {"cyrillic"} in kinds[1::2]
    assert any(set(words) == {"[UNK]"} for words in found[1::2]) and not any("[CLS]" in words for words in found)


def test_the_default_patch_is_silent_on_other_random_texts():
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer)
    kept = {name: texts[:3] for name, texts in memory().items()}  # a memory that says little of what texts there are
    shares = []
    for count in (0, 400):
        patches = edit(model, tokenizer, requests, "mpn", memory=kept, memory_noise=count, progress=False)
        cache = FeatureCache(model, tokenizer, head_of(model).site)
        cache.want(Probe(text=probe.text) for probe in noise(tokenizer, 300, random.Random(99)))
        cache.fill(lambda stage, done, total: None)
        part = next(iter(patches.parts.values()))
        shares.append((cache.x @ part.keys.T + part.bias > 0).double().mean().item())
    assert shares[1] < 0.5 * shares[0], shares
