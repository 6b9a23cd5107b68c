"""Predictions do not depend on batching or order, take pairs, and leave the model's modes alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from xpatch.errors import MismatchError
from xpatch.evaluation import batches, label_index, predict, predict_indices
from xpatch.patches.requests import Probe

RNG = random.Random(0)
TEXTS = [" ".join(f"w{RNG.randrange(60)}" for _ in range(RNG.randint(1, 20))) for _ in range(37)]


def one_by_one(model, tokenizer, probes):
    with torch.no_grad():
        return [
            int(model(**tokenizer(p.text, p.text_pair, truncation=True, return_tensors="pt")).logits.argmax()) for p in probes
        ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_any_batching_gives_the_single_text_answer(model, tokenizer, batch_size):
    probes = [Probe(text=t, text_pair=None if i % 3 else TEXTS[-i]) for i, t in enumerate(TEXTS)]
    assert predict_indices(model, tokenizer, probes, batch_size=batch_size).tolist() == one_by_one(
        model, tokenizer, probes
    )


def test_labels_are_named_in_the_order_given(model, tokenizer):
    expected = [model.config.id2label[i] for i in predict_indices(model, tokenizer, TEXTS)]
    assert predict(model, tokenizer, TEXTS) == expected
    assert set(expected) == {"REFUTES", "SUPPORTS"}


def test_no_probes(model, tokenizer):
    assert predict(model, tokenizer, []) == []


def test_modes_are_put_back(model, tokenizer):
    model.train()
    model.bert.pooler.eval()
    predict(model, tokenizer, TEXTS[:3])
    assert model.training and not model.bert.pooler.training and model.classifier.training


def test_batches_are_sorted_by_length_and_cover_every_row(model, tokenizer):
    made = list(batches(model, tokenizer, TEXTS, batch_size=8))
    widths = [inputs["input_ids"].shape[1] for _, inputs in made]
    assert widths == sorted(widths, reverse=True)
    assert sorted(np.concatenate([rows for rows, _ in made]).tolist()) == list(range(len(TEXTS)))


def test_long_texts_are_truncated(model, tokenizer):
    assert len(predict(model, tokenizer, [" ".join(["w1"] * 500)])) == 1


def test_decoder_without_a_padding_token_is_fed_one_text_at_a_time(tokenizer):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3)
    model = GPT2ForSequenceClassification(config).eval()
    plain = list(TEXTS[:5])
    with torch.no_grad():
        alone = [
            int(
                model(
                    **{k: v for k, v in tokenizer(t, return_tensors="pt").items() if k != "token_type_ids"}
                ).logits.argmax()
            )
            for t in plain
        ]
    tokenizer_without_types = _without_types(tokenizer)
    assert predict_indices(model, tokenizer_without_types, plain).tolist() == alone
    config.pad_token_id = 0
    assert predict_indices(model, tokenizer_without_types, plain).tolist() == alone


def test_xlm_roberta_positions_begin_after_the_padding_index(tokenizer):
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=20, type_vocab_size=2, pad_token_id=1,
    )  # fmt: skip
    model = XLMRobertaForSequenceClassification(config).eval()
    assert len(predict(model, tokenizer, [" ".join(["w1"] * 100)])) == 1


def test_bad_input_is_named(model, tokenizer):
    with pytest.raises(MismatchError, match=r"MAYBE.*REFUTES"):
        label_index(model, "MAYBE")
    assert label_index(model, "1") == 1
    with pytest.raises(MismatchError, match="sequence classifier"):
        predict(model.bert.encoder, tokenizer, TEXTS)
    with pytest.raises(ValueError, match="batch_size"):
        predict(model, tokenizer, TEXTS, batch_size=0)


def test_a_model_that_is_no_sequence_classifier(tokenizer, model):
    from transformers import BertForMaskedLM

    with pytest.raises(MismatchError, match="sequence classifier"):
        predict(BertForMaskedLM(model.config).eval(), tokenizer, TEXTS[:2])


def _without_types(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.model_input_names = ["input_ids", "attention_mask"]
    return made
