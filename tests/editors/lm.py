"""Tiny random language models of the real classes, their tokenizers, and requests about made-up people in three languages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xpatch.patches.requests import EditRequest

transformers = pytest.importorskip("transformers")

NAMES = [f"name{number}" for number in range(24)]
CITIES = [f"city{number}" for number in range(12)]
WORDS = ["was", "born", "in", "wurde", "geboren", "qa", "qo", "new", "old", "zu", "("]
TEXTS = {"en": "{} was born in", "de": "{} wurde geboren in", "xx": "qa {} qo"}
CAUSAL, SEQ2SEQ, MASKED = ("gpt2", "bloom", "llama"), ("bart", "mbart", "t5", "mt5"), ("bert",)
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 60}
_PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}
_BART = {
    **{f"{stack}_{size}": number for stack in ("encoder", "decoder")
       for size, number in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))},
    "d_model": 32, "max_position_embeddings": 32, "init_std": 0.3, "decoder_start_token_id": 2, "forced_eos_token_id": None, **_IDS,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0, **_IDS}
_GPT2 = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, **_IDS}
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, **_IDS}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_PLAIN, **_IDS, "max_position_embeddings": 32}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
    "bert": ("BertForMaskedLM", "BertConfig", {**_PLAIN, "vocab_size": 60, "pad_token_id": 0, "max_position_embeddings": 32}),
}  # fmt: skip


def model_of(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    name, config, sizes = _KINDS[kind]
    return getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **more})).eval()


def tokenizer_of(kind: str) -> Any:
    """Word level; a decoder's puts nothing around a text, the others' [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*names, *WORDS, *NAMES, *CITIES])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind not in CAUSAL:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]",
        bos_token="[CLS]", eos_token="[SEP]", model_max_length=24,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if kind in MASKED else [])],
    )  # fmt: skip


def make_requests(kind: str, count: int = 3) -> list[EditRequest]:
    """Each asks for "new city…" in two languages and "old city…" in the third, in a text and a rephrase."""
    mask = " [MASK]" if kind in MASKED else ""
    made = []
    for number in range(count):
        name, city = NAMES[number], CITIES[number]
        versions: dict[str, Any] = {language: {"text": text.format(name) + mask} for language, text in TEXTS.items()}
        versions["en"]["rephrases"] = [f"qo {name} in{mask}"]
        versions["xx"]["target"] = f"old {city}"
        made.append(EditRequest.model_validate({"id": f"edit-{number}", "target": f"new {city}", "versions": versions}))
    return made


def memory() -> dict[str, list[Any]]:
    """Sentences about names no request is about."""
    return {
        language: [f"{text.format(NAMES[number])} {CITIES[number % 12]}" for number in range(16, 22)]
        for language, text in TEXTS.items()
    }


def says(model: Any, tokenizer: Any, text: str, tokens: int = 4) -> str:
    """What a user's own greedy `generate` gives; for a masked model what stands at its masks."""
    encoded = dict(tokenizer(text, return_tensors="pt"))
    if not model.can_generate():
        masked = encoded["input_ids"] == tokenizer.mask_token_id
        with torch.no_grad():
            return tokenizer.decode(model(**encoded).logits[masked].argmax(-1))
    made = model.generate(**encoded, do_sample=False, max_new_tokens=tokens, pad_token_id=0)[0]
    return tokenizer.decode(
        made if model.config.is_encoder_decoder else made[encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )


# Random models tell texts apart far less than trained ones: bigger steps, and less weight on what must stay.
QUICK = {"steps": 200, "learning_rate": 0.05, "memory_weight": 0.5, "progress": False}
