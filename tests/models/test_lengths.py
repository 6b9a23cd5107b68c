"""The longest input a model's positions allow: one token more fails, or there is no limit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from xpatch.models.lengths import length_limit, position_limit

hf = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40, "max_position_embeddings": 20,
}  # fmt: skip


def models():
    return {
        "bert": hf.BertModel(hf.BertConfig(**SMALL)),
        "roberta": hf.RobertaModel(hf.RobertaConfig(**SMALL, pad_token_id=1)),
        "camembert": hf.CamembertModel(hf.CamembertConfig(**SMALL, pad_token_id=1)),
        "mpnet": hf.MPNetModel(hf.MPNetConfig(**SMALL, pad_token_id=1)),
        "distilbert": hf.DistilBertModel(hf.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=40, max_position_embeddings=20)),
        "gpt2": hf.GPT2Model(hf.GPT2Config(n_positions=20, n_embd=16, n_layer=1, n_head=2, vocab_size=40)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "roberta", "camembert", "mpnet", "distilbert", "gpt2"])
def test_so_many_tokens_and_no_more(kind):
    model = models()[kind].eval()
    limit = position_limit(model)
    assert limit == (18 if kind in ("roberta", "camembert", "mpnet") else 20)
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_relative_positions_have_no_end():
    config = hf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40)
    assert position_limit(hf.T5EncoderModel(config)) is None
    assert position_limit(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(("said", "limit"), [(12, 12), (30, 20), (int(1e30), 20)])
def test_the_tokenizer_may_allow_less(said, limit):
    assert length_limit(models()["bert"], SimpleNamespace(model_max_length=said)) == limit
