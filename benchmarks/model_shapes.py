"""The models of the latency benchmark: random weights at named shapes, or a folder's own, and what their calls look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpatch import XpatchError

CALIBRATION_TEXTS, CALIBRATION_STREAMS = 16, 2
_FIRST_ID = 10  # below are padding and other special tokens


@dataclass(frozen=True)
class Subject:
    """One model to measure.

    make: seed -> the model in eval mode. site: the FFN that gets the patches; reads, adds: dotted names of the modules whose input
    is that FFN's input, and whose output is its output. decoder: calls are one-token steps on a cache. dtypes: to try; the quickest stays.
    settings: what decides the weights, for telling kept rows apart.
    """

    name: str
    make: Callable[[int], Any]
    site: str
    reads: str
    adds: str
    decoder: bool
    patches: int
    batches: tuple[int, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    settings: Mapping[str, Any] | None = None


_ENCODER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072}
_LLAMA = {
    "vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 8192, "head_dim": 64, "max_position_embeddings": 131_072, "tie_word_embeddings": True,
}  # fmt: skip
_CLASSIFIER: dict[str, Any] = {"decoder": False, "patches": 4598, "batches": (1, 8, 32), "tokens": (32, 128)}
_DECODER: dict[str, Any] = {"decoder": True, "patches": 1000, "batches": (1, 8), "tokens": (32, 128)}

#: name -> model class, configuration class, sizes, (site, reads, adds) with {} for the last layer, and how it is called.
_SHAPES: dict[str, tuple[str, str, dict[str, Any], tuple[str, str, str], dict[str, Any]]] = {
    "bert-base": (
        "BertForSequenceClassification", "BertConfig", _ENCODER,
        ("bert.encoder.layer.{}", "intermediate.dense", "output.dense"), _CLASSIFIER,
    ),
    "xlmr-base": (
        "XLMRobertaForSequenceClassification", "XLMRobertaConfig",
        {**_ENCODER, "vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1},
        ("roberta.encoder.layer.{}", "intermediate.dense", "output.dense"), _CLASSIFIER,
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2, ("transformer.h.{}.mlp", "c_fc", "c_proj"), _DECODER),
    "llama-1b": (
        "LlamaForCausalLM", "LlamaConfig", _LLAMA, ("model.layers.{}.mlp", "up_proj", "down_proj"),
        {**_DECODER, "dtypes": (torch.float32, torch.bfloat16)},
    ),
}  # fmt: skip
NAMES = tuple(_SHAPES)


def subject(name: str, **sizes: Any) -> Subject:
    """The named shape with random weights; sizes: other values for its configuration. Raises `XpatchError` for an unknown name."""
    if name not in _SHAPES:
        raise XpatchError(f"latency benchmark: no shape is called {name!r}; shapes are {', '.join(NAMES)}")
    model_class, config_class, own, (site, reads, adds), calls = _SHAPES[name]
    config = {**own, **sizes}
    site = site.format((config.get("num_hidden_layers") or config["n_layer"]) - 1)

    def make(seed: int) -> Any:
        import transformers

        torch.manual_seed(seed)
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**config)).eval()

    return Subject(name, make, site, f"{site}.{reads}", f"{site}.{adds}", settings=config, **calls)


def folder_subject(name: str, folder: Path, model: Any, site: tuple[str, str, str], decoder: bool) -> Subject:
    """A loaded model as a subject; site: name, reads, adds of its final FFN. Kept rows are found again while its files are the same."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())}
    calls = _DECODER if decoder else _CLASSIFIER
    return Subject(name, lambda seed: model, *site, settings={"folder": str(folder), "files": files}, **calls)


def grid(
    chosen: Sequence[Subject], batches: Sequence[int], tokens: Sequence[int], quick: bool
) -> dict[str, list[tuple[int, int]]]:
    """model -> its (batch, tokens): those given, else its own; quick: the smaller ones."""
    return {
        one.name: [
            (batch, length)
            for length in tokens or (one.tokens[:1] if quick else one.tokens)
            for batch in batches or (one.batches[:2] if quick else one.batches)
        ]
        for one in chosen
    }


def random_ids(model: Any, batch: int, tokens: int, seed: int) -> Tensor:
    """`[B, T]` token ids without special ones."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(_FIRST_ID, model.config.vocab_size, (batch, tokens), generator=draw)


def classify(model: Any, ids: Tensor) -> Callable[[Any], Tensor]:
    """model -> its logits on `ids [B, T]`, no padding."""
    seen = torch.ones_like(ids)
    return lambda model: model(input_ids=ids, attention_mask=seen).logits


def step(model: Any, ids: Tensor) -> Callable[[Any], Callable[[], Tensor]]:
    """model -> a call that takes one step: the logits of the last of `ids [B, T + 1]` on a cache of the T before.

    Each model gets a cache of its own, which a call leaves as it found it.
    """
    import copy

    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

    def bound(model: Any) -> Callable[[], Tensor]:
        own = copy.deepcopy(cache)

        def call() -> Tensor:
            logits: Tensor = model(input_ids=ids[:, -1:], past_key_values=own, use_cache=True).logits
            own.crop(-1)
            return logits

        return call

    return bound
