"""The bundled verifier as a user meets it: `xpatch.zoo.load("verifier")`."""

from __future__ import annotations

import pytest
import torch

import xpatch.zoo
from xpatch.errors import XpatchError
from xpatch.zoo.verifier import data

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def verifier():
    return xpatch.zoo.load("verifier")


def test_is_a_plain_hugging_face_pair_in_eval_mode(verifier):
    model, tokenizer = verifier
    assert isinstance(model, transformers.BertForSequenceClassification) and not model.training
    assert tokenizer.is_fast and model.dtype == torch.float32
    assert model.config.label2id == {"REFUTES": 0, "SUPPORTS": 1}


def test_fits_the_package():
    files = list(xpatch.zoo.folder("verifier").iterdir())
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20


def test_unknown_name_is_refused():
    with pytest.raises(XpatchError, match="verifier"):
        xpatch.zoo.load("oracle")


@pytest.mark.parametrize(
    ("language", "least"), [("en", 0.80), ("de", 0.70), ("fr", 0.70), ("es", 0.70), ("zh", 0.60), ("ar", 0.60)]
)
def test_knows_the_test_facts(verifier, language, least):
    """Well under the published accuracies, well over chance: a broken file or tokenizer fails here."""
    model, tokenizer = verifier
    claims = data.claims("test")[::4] + data.claims("test")[1::4]
    batch = tokenizer([c.texts[language][0] for c in claims], padding=True, return_tensors="pt")
    with torch.inference_mode():
        predicted = model(**batch).logits.argmax(-1).tolist()
    right = sum(model.config.id2label[p] == c.label for p, c in zip(predicted, claims, strict=True))
    assert right / len(claims) >= least


def test_pairs_and_long_texts_are_cut_to_the_model(verifier):
    model, tokenizer = verifier
    batch = tokenizer(["word " * 200], ["more " * 200], truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == model.config.max_position_embeddings
    with torch.inference_mode():
        assert model(**batch).logits.isfinite().all()
