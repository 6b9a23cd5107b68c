"""Every test starts from the same seeds, and leaves torch's thread count as it found it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("xpatch", deadline=None, max_examples=40, print_blob=True)
hypothesis.settings.load_profile("xpatch")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


TINY = ("bert", "bert-mlm", "xlm-r", "gpt2", "gpt2-lm", "distilbert", "opt", "llama")


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny(family, **config)`: a random model of the real class in eval mode, width 32, FFN 64, vocabulary 100."""

    def make(family: str, *, layers: int = 2, **more: Any) -> Any:
        import transformers as hf

        encoder = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
        gpt2 = {
            "n_embd": 32,
            "n_layer": layers,
            "n_head": 4,
            "n_inner": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        distil = {"dim": 32, "n_layers": layers, "n_heads": 4, "hidden_dim": 64}
        opt = {
            "hidden_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
        }
        classes = {
            "bert": (hf.BertForSequenceClassification, hf.BertConfig, encoder),
            "bert-mlm": (hf.BertForMaskedLM, hf.BertConfig, encoder),
            "xlm-r": (hf.XLMRobertaForSequenceClassification, hf.XLMRobertaConfig, encoder),
            "gpt2": (hf.GPT2ForSequenceClassification, hf.GPT2Config, gpt2),
            "gpt2-lm": (hf.GPT2LMHeadModel, hf.GPT2Config, gpt2),
            "distilbert": (hf.DistilBertForSequenceClassification, hf.DistilBertConfig, distil),
            "opt": (hf.OPTForCausalLM, hf.OPTConfig, opt),
            "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, encoder),
        }
        model, config, sizes = classes[family]
        return model(config(vocab_size=100, **sizes, **more)).eval()

    return make


@pytest.fixture
def token_ids() -> torch.Tensor:
    """`[3, 7]`, no special tokens."""
    return torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(1))
