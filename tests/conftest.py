"""Every test starts from the same seeds, and leaves torch's thread count as it found it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: read when torch is loaded, and by its processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

hypothesis.settings.register_profile("xpatch", deadline=None, max_examples=40, print_blob=True)
hypothesis.settings.load_profile("xpatch")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: one for each core this process may use, eight at most, for each holds torch and models of its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


#: In a family's sizes: replaced by the number of layers asked for.
LAYERS: Any = object()
_PLAIN = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_PLAIN, **_SPECIAL, "num_key_value_heads": 2}
_HEADED = {**_GROUPED, "head_dim": 8}
_GPT2 = {**_SPECIAL, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_inner": 64}
_DISTIL = {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64}
_OPT = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
}
_XLM = {"emb_dim": 32, "n_layers": LAYERS, "n_heads": 4, "n_langs": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4, "decoder_start_token_id": 0}
_STACKS = {f"{stack}_{size}": number for stack in ("encoder", "decoder")
           for size, number in (("layers", LAYERS), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
_BART = {**_STACKS, "d_model": 32, "max_position_embeddings": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
_BLOOM = {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4}
_CLASSIFIER_IDS = {**_SPECIAL, "cls_token_id": 1, "sep_token_id": 2}
_FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    **_PLAIN, **_SPECIAL, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
           "patch_size": 14}  # fmt: skip

#: Family -> class, configuration class and sizes; the vocabulary is 100 everywhere.
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _PLAIN),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _PLAIN),
    "xlm-r": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", _PLAIN),
    "xlm-r-mlm": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", _PLAIN),
    "xlm-r-xl": ("XLMRobertaXLForMaskedLM", "XLMRobertaXLConfig", _PLAIN),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _PLAIN),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL),
    "distilbert-mlm": ("DistilBertForMaskedLM", "DistilBertConfig", _DISTIL),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", {**_PLAIN, **_CLASSIFIER_IDS}),
    "modernbert-mlm": ("ModernBertForMaskedLM", "ModernBertConfig", {**_PLAIN, **_CLASSIFIER_IDS}),
    "eurobert": ("EuroBertForMaskedLM", "EuroBertConfig", _GROUPED),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_PLAIN, "embedding_size": 16}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _PLAIN),
    "mdeberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", {
        **_PLAIN, "relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": 16, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    }),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_PLAIN, "embedding_size": 16}),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", _PLAIN),
    "convbert": ("ConvBertForMaskedLM", "ConvBertConfig", {**_PLAIN, "embedding_size": 32}),
    "xlm": ("XLMWithLMHeadModel", "XLMConfig", _XLM),
    "flaubert": ("FlaubertWithLMHeadModel", "FlaubertConfig", _XLM),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BART),
    "m2m100": ("M2M100ForConditionalGeneration", "M2M100Config", _BART),
    "marian": ("MarianMTModel", "MarianConfig", _BART),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BART),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", _GPT2),
    "gpt2-lm": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig", _BLOOM),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", {"d_model": 32, "ffn_dim": 64, "num_layers": LAYERS, "attention_heads": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _PLAIN),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEADED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEADED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 16}),
    "gemma3-vision": ("Gemma3ForConditionalGeneration", "Gemma3Config", {
        "text_config": {**_GROUPED, "head_dim": 16}, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 4,
        "boi_token_index": 3, "eoi_token_index": 3,
    }),
    "phi": ("PhiForCausalLM", "PhiConfig", _PLAIN),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_PLAIN, "ffn_hidden_size": 64}),
    "falcon-new": ("FalconForCausalLM", "FalconConfig", {
        **_PLAIN, "ffn_hidden_size": 64, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True,
    }),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _PLAIN),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _GROUPED),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", _HEADED),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "expansion_ratio": 2}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", _GROUPED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _GROUPED),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", _PLAIN),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        **_GROUPED, **_FEW_EXPERTS, "shared_expert_intermediate_size": 48,
    }),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEADED, **_FEW_EXPERTS}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**_HEADED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {**_HEADED, "num_local_experts": 4, "intermediate_size_mlp": 64}),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_GROUPED, "num_local_experts": 4}),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", {
        **_SPECIAL, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_key_value_heads": 2, "kv_channels": 8,
        "intermediate_size": 64, "num_local_experts": 4,
    }),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**_GROUPED, "num_local_experts": 4}),
    "nllb-moe": ("NllbMoeForConditionalGeneration", "NllbMoeConfig", {
        **_BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_eval_capacity_token_fraction": 1.0,
    }),
    "switch": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {
        **_T5, "num_decoder_layers": LAYERS, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    }),
    "jamba": ("JambaForCausalLM", "JambaConfig", {
        **_GROUPED, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4, "mamba_d_state": 4,
    }),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": LAYERS}),
}  # fmt: skip


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny(family, layers=2, **config)`: a random model of the real class in eval mode, width 32, FFN 64, vocabulary 100.

    The families are the keys of `TINY`; one that the installed transformers lacks skips the test.
    """

    def make(family: str, *, layers: int = 2, **more: Any) -> Any:
        import transformers as hf

        names, sizes = TINY[family][:2], _counted({**TINY[family][2], **more}, layers)
        kind, config = (getattr(hf, name, None) for name in names)
        if kind is None or config is None:
            pytest.skip(f"transformers {hf.__version__} has no {names[0]}")
        inner = sizes.get("text_config")
        (sizes if inner is None else inner)["vocab_size"] = 100
        return kind(config(**sizes)).eval()

    return make


def _counted(sizes: dict[str, Any], layers: int) -> dict[str, Any]:
    return {
        key: layers if value is LAYERS else _counted(value, layers) if isinstance(value, dict) else value
        for key, value in sizes.items()
    }


@pytest.fixture
def token_ids() -> torch.Tensor:
    """`[3, 7]`, no special tokens."""
    return torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def drawn_cases() -> Callable[..., Any]:
    """In the place of `xpatch.benchmarks.trained.cases`: patches that are drawn instead of trained, in no time."""
    from types import SimpleNamespace

    def cases(
        kind: str,
        neurons: int,
        rows: int,
        width: int,
        *,
        seed: int,
        positions: str = "read",
        progress: bool | None = None,
    ) -> Any:
        draw = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(rows, width, generator=draw) for _ in range(2))
        keys = torch.randn(neurons, width, generator=draw) / width**0.5
        bias = torch.full((neurons,), 9.0 if kind == "adversarial" else -2.5)
        values = torch.randn(neurons, width, generator=draw)
        activation = "gelu" if kind == "paper" else "relu"
        found = {"edges": [-9.0, 0.0, 9.0], "shares": [0.99, 0.01]}
        told = {"histogram": found, "source": "drawn", "info": {"positions": positions}}
        rows_of = {"x": x, "y": y, "memory": torch.randn(20, width, generator=draw)}
        return SimpleNamespace(keys=keys, bias=bias, values=values, activation=activation, **rows_of, **told)

    return cases
