"""PyTorch and ONNX Runtime agree, on a tiny model and on the bundled verifier in its six languages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xpatch
from tests.exporters.conftest import bert, lowrank, masks, neurons, transformers
from xpatch import zoo
from xpatch.exporters import Session, export_adapter, export_base, verify
from xpatch.models import capture, final_ffn
from xpatch.patches.identity import identify

WORDS = [f"w{i}" for i in range(50)]
TEXTS = {"en": [" ".join(WORDS[i : i + 7]) for i in range(12)], "zh": [(WORDS[i], "w1 w2") for i in range(5)]}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def test_a_tiny_model(bert_base, tokenizer, tmp_path):
    patches = xpatch.PatchSet(
        parts={"n": neurons(bert_base.site, 5, mask="m", scale=30.0), "d": lowrank(bert_base.down, 2)},
        masks={"m": masks("en")},
    )
    report = verify(bert_base.model, tokenizer, bert_base.folder, patches, TEXTS, batch_size=4)
    assert report.ok and report.changed == 0 and report.max_diff < 1e-4
    assert [(one.language, one.texts) for one in report.languages] == [("en", 12), ("zh", 5)]
    path = export_adapter(patches, bert_base.folder, tmp_path / "p.onnx_adapter")
    assert verify(bert_base.model, tokenizer, bert_base.folder, path, TEXTS).to_dict()["ok"]


def test_a_difference_is_reported(bert_base, tokenizer, monkeypatch):
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda *a, **k: {"logits": -run(*a, **k)["logits"]})
    patches = xpatch.PatchSet(parts={"n": neurons(bert_base.site, 5)})
    report = verify(bert_base.model, tokenizer, bert_base.folder, patches, TEXTS)
    assert not report.ok and report.changed > 0 and report.to_dict()["languages"]["en"]["base_changed"] > 0


def test_what_is_refused(bert_base, tokenizer):
    patches = xpatch.PatchSet(parts={"n": neurons(bert_base.site, 5)})
    with pytest.raises(xpatch.MismatchError, match="was not exported from this model: .*expected"):
        verify(bert(seed=3), tokenizer, bert_base.folder, patches, TEXTS)
    with pytest.raises(xpatch.MismatchError, match="found no texts"):
        verify(bert_base.model, tokenizer, bert_base.folder, patches, {"en": []})
    with pytest.raises(xpatch.FormatError, match="all single texts or all pairs"):
        verify(bert_base.model, tokenizer, bert_base.folder, patches, {"en": ["w1", ("w1", "w2")]})


def test_the_bundled_verifier_in_six_languages(tmp_path):
    """Patches that fire on real claims: a ReLU neuron for the English version of each of some claims, and random ones."""
    from xpatch.zoo.verifier import data

    model, tokenizer = zoo.load("verifier")
    base = export_base(model, tmp_path / "onnx", tokenizer=tokenizer)
    claims = data.claims("test")[:40]
    texts = {language: [claim.texts[language][0] for claim in claims] for language in data.LANGUAGES}
    x = capture(model, tokenizer(texts["en"], padding=True, return_tensors="pt")).x
    keys = torch.cat([x / x.square().sum(1, keepdim=True), torch.randn(260, x.shape[1]) * 0.02])
    patches = xpatch.PatchSet(
        parts={
            "n": xpatch.PatchNeurons(
                site=final_ffn(model).name,
                keys=keys,
                bias=torch.full((300,), -0.5),
                values=torch.randn(300, x.shape[1]),
                activation="relu",
            )
        },
        base=identify(model, tokenizer),
        name="fixes",
    )
    path = export_adapter(patches, base, tmp_path / "fixes.onnx_adapter")
    report = verify(model, tokenizer, base, path, texts)
    assert report.ok, report.to_dict()
    assert all(one.texts == 40 for one in report.languages) and len(report.languages) == 6
    assert sum(one.moved for one in report.languages) > 0

    session = Session(base, path)
    encoded = tokenizer(texts["zh"], padding=True, return_tensors="pt")
    expected = {}
    with torch.no_grad():
        expected["off"] = model(**encoded).logits.numpy()
        xpatch.apply(model, patches, tokenizer=tokenizer)
        expected["on"] = model(**encoded).logits.numpy()
    for choice, name in ((None, "on"), ("__base__", "off")):
        assert np.abs(session.run(encoded, xpatch=xpatch.Rows(patches=choice))["logits"] - expected[name]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert-mlm", "gpt2-lm", "t5"])
def test_language_models_token_by_token(family, tiny, tokenizer, tmp_path):
    torch.manual_seed(2)
    model = tiny(family)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    export_base(model, tmp_path / "onnx")
    patches = xpatch.PatchSet(parts={"n": neurons(final_ffn(model).name, 5, mask="m")}, masks={"m": masks("en")})
    texts = {"en": TEXTS["en"][:5] + ["w3"], "zh": ["w1 w2 w4", "w7"]}
    report = verify(model, tokenizer, tmp_path / "onnx", patches, texts, batch_size=4, allow=("tokenizer",))
    assert report.ok and [one.texts for one in report.languages] == [6, 2]
    assert sum(one.moved for one in report.languages) > 0
