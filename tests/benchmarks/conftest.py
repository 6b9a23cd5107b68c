"""A tiny classifier of the real class with the words of a tiny protocol."""

from __future__ import annotations

import random

import pytest
import torch

from xpatch import EditRequest
from xpatch.benchmarks.protocol import Protocol
from xpatch.patches.requests import Probe, Version

WORDS = [f"w{i}" for i in range(60)]
LABELS = ("REFUTES", "SUPPORTS")
LANGUAGES = ("en", "de", "zh")


def sentence(seed):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(8))


@pytest.fixture(scope="package")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)


@pytest.fixture
def model():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)}, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="package")
def protocol():
    def made(rephrase):
        return [
            EditRequest(
                id=f"c{i}",
                target=LABELS[i % 2],
                versions={
                    language: Version(
                        text=sentence(f"{i}{language}"),
                        subject=f"s{i}",
                        rephrases=(Probe(text=sentence(f"{i}{language}{rephrase}")),),
                    )
                    for language in LANGUAGES
                },
            )
            for i in range(10)
        ]

    def locality(kind):
        return {
            language: [Probe(text=sentence(f"{kind}{language}{i}"), target=LABELS[i % 2]) for i in range(16)]
            for language in LANGUAGES
        }

    groups = {kind: [f"{kind}{i // 2}" for i in range(16)] for kind in ("train", "test")}
    return Protocol(made("seen"), made("unseen"), locality("train"), locality("test"), groups)


@pytest.fixture
def quick(monkeypatch, protocol):
    """The real editors on few steps and a small memory, so that a run takes a second."""
    import xpatch

    edit = xpatch.edit

    def hurried(model, tokenizer, requests, **settings):
        texts = {language: [probe.text for probe in probes] for language, probes in protocol.locality_train.items()}
        steps = {} if settings["method"] == "ft" else {"steps": 3}
        if settings["method"] in ("t-patcher", "mpn-only", "mpn", "mpn-masked"):
            steps |= {"rescue": False, "memory_noise": 20}
        return edit(model, tokenizer, requests, **{"memory": texts, **steps, **settings})

    monkeypatch.setattr(xpatch, "edit", hurried)
