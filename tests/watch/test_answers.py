"""Where each kind of model answers, against the model's own output."""

from __future__ import annotations

import pytest
import torch

from xpatch import MismatchError
from xpatch.evaluation.predict import batches
from xpatch.watch.answers import Reader

TEXTS = ["w5 w6 w7 w8", "w9 w10", "w11 w12 w13 w14 w15 w16"]


def read(model, tokenizer, texts=TEXTS, size=8):
    reader = Reader(model, tokenizer)
    found = {}
    for numbers, inputs in batches(model, tokenizer, texts, batch_size=size):
        inputs = reader.complete(inputs)
        with torch.no_grad():
            logits, position = reader.read(model(**inputs), inputs)
        for row, number in enumerate(numbers):
            found[int(number)] = logits[row], None if position is None else int(position[row])
    return reader, [found[number] for number in range(len(texts))]


def alone(model, tokenizer, text):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("family", ["bert", "xlm-r", "distilbert"])
def test_classifiers_answer_with_their_logits_and_read_the_first_token(tiny, word_tokenizer, family):
    model = tiny(family)
    reader, found = read(model, word_tokenizer)
    for text, (logits, position) in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(logits, alone(model, word_tokenizer, text), rtol=1e-4, atol=1e-5)
        assert position == 0
    (best,) = reader.top(found[0][0])
    assert best.label == model.config.id2label[int(found[0][0].argmax())] and 0.5 <= best.probability <= 1
    assert str(best) == f"{best.label} {best.probability:.3f}"


def test_a_decoder_classifier_reads_the_last_token(tiny, word_tokenizer):
    _, found = read(tiny("gpt2"), word_tokenizer)
    assert [position for _, position in found] == [5, 3, 7]  # [CLS] and [SEP] around the words


def test_a_masked_language_model_answers_at_the_mask(tiny, word_tokenizer):
    model, texts = tiny("bert-mlm"), ["w5 [MASK] w7", "w5 w6 w7 w8 [MASK] [MASK]", "w5 w6"]
    reader, found = read(model, word_tokenizer, texts)
    assert [position for _, position in found] == [2, 5, 3]  # the first mask; without one the last token
    for text, (logits, position) in zip(texts, found, strict=True):
        torch.testing.assert_close(logits, alone(model, word_tokenizer, text)[position], rtol=1e-4, atol=1e-5)
    top = reader.top(found[0][0], 3)
    expected = word_tokenizer.convert_ids_to_tokens(found[0][0].topk(3).indices.tolist())
    assert [answer.label for answer in top] == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_answers_after_its_last_token_whatever_the_padding(tiny, word_tokenizer, side):
    import copy

    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.padding_side = side
    model = tiny("llama", pad_token_id=0)
    _, found = read(model, tokenizer)
    for text, (logits, _) in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(logits, alone(model, tokenizer, text)[-1], rtol=1e-3, atol=1e-4)


def test_an_encoder_decoder_answers_with_its_first_token(tiny, word_tokenizer):
    model = tiny("t5")
    _, found = read(model, word_tokenizer)
    for text, (logits, position) in zip(TEXTS, found, strict=True):
        inputs = word_tokenizer(text, return_tensors="pt")
        start = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.no_grad():
            expected = model(**inputs, decoder_input_ids=start).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert position is None


def test_a_model_without_a_head_is_refused(tiny, word_tokenizer):
    with pytest.raises(MismatchError, match="expected logits .* found none"):
        read(tiny("bert").bert, word_tokenizer)
