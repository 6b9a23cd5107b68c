"""What each graph of an exported model computes: its inputs, its outputs, a sample to trace it with, and the call itself.

A classifier or masked language model is one graph. A decoder is one graph too: the cache may hold any number of tokens, none included.
An encoder-decoder is two: "encoder", which also gives the keys and values of cross attention, and "decoder".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.exporters.description import PAST, PRESENT, CacheTensor, Kind

Tensors = Mapping[str, torch.Tensor]
Axes = Mapping[int, str]

_TOKENS: Axes = {0: "batch", 1: "tokens"}
_BATCH, _LENGTH, _OLDER = 2, 7, 5  # of the traced call; 0 and 1 would be taken for constants
_TEXT = 6  # tokens of the text an encoder-decoder is traced with


@dataclass(frozen=True)
class Call:
    """One graph: `compute` takes the model and a tensor for each of `inputs`, and gives one for each of `outputs`.

    inputs, outputs: name -> its dynamic axes. sample: tensors to trace with. tokens: length of what the graph's FFNs see there.
    """

    graph: str
    file: str
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    sample: Tensors
    compute: Callable[[nn.Module, Tensors], tuple[torch.Tensor, ...]]
    tokens: int


@dataclass(frozen=True)
class Plan:
    """All graphs of a model. cache: the tensors that go from one step to the next, in the order of the graphs' inputs."""

    kind: Kind
    calls: tuple[Call, ...]
    cache: tuple[CacheTensor, ...] = ()


def plan(model: nn.Module) -> Plan:
    """How to export a model. Raises `MismatchError` for one that takes no text, or whose state is not keys and values."""
    return {"encoder-decoder": _encoder_decoder, "decoder": _decoder, "logits": _logits}[plan_kind(model)](model)


def plan_kind(model: Any) -> Kind:
    """What is exported of a model: logits alone, or what text is generated with."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return "logits"
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder"
    return "decoder" if "past_key_values" in _accepted(model) else "logits"


def input_names(model: nn.Module) -> tuple[str, ...]:
    """The token inputs of a model: ids, mask, and token types where the model has more than one."""
    names = ["input_ids", "attention_mask"]
    accepted = _accepted(model)
    if "token_type_ids" in accepted and (getattr(getattr(model, "config", None), "type_vocab_size", 1) or 1) > 1:
        names.append("token_type_ids")
    missing = [name for name in names if name not in accepted]
    if missing:
        raise MismatchError(
            f"{type(model).__name__} cannot be exported: its forward takes no {', '.join(missing)}; only text models can"
        )
    return tuple(names)


def sample(model: nn.Module, batch: int, tokens: int, padded: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """A call of random token ids `[batch, tokens]`, the last row's last (or first) `padded` tokens being padding."""
    config: Any = getattr(model, "config", None)
    padding = getattr(config, "pad_token_id", None) or 0
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(config.vocab_size), (batch, tokens), generator=draw)
    ids[ids == padding] = (padding + 1) % int(config.vocab_size)
    mask = torch.ones_like(ids)
    if padded:
        where = slice(None, padded) if left else slice(-padded, None)
        ids[-1, where], mask[-1, where] = padding, 0
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: every[name] for name in input_names(model)}


def positions(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions `[B, tokens]` of the last tokens, padding not counted, as `generate` of transformers has them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def takes_positions(model: nn.Module) -> bool:
    """True where `position_ids` can be given."""
    return "position_ids" in _accepted(model)


def _logits(model: nn.Module) -> Plan:
    def compute(model: nn.Module, given: Tensors) -> tuple[torch.Tensor, ...]:
        return (model(**given)["logits"],)

    taken = sample(model, _BATCH, _LENGTH, padded=2)
    inputs = dict.fromkeys(taken, _TOKENS)
    return Plan("logits", (Call("model", "model.onnx", inputs, {"logits": {0: "batch"}}, taken, compute, _LENGTH),))


def _decoder(model: nn.Module) -> Plan:
    taken = sample(model, _BATCH, _LENGTH)
    taken = {name: taken[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        cache = _described(model, model(**taken, use_cache=True)["past_key_values"])

    def compute(model: nn.Module, given: Tensors) -> tuple[torch.Tensor, ...]:
        ids, mask = given["input_ids"], given["attention_mask"]
        known = {"position_ids": positions(mask, ids.shape[1])} if takes_positions(model) else {}
        past = _cache([given[PAST + one.name] for one in cache])
        out = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, **known)
        return (out["logits"], *_tensors(out["past_key_values"]))

    taken["attention_mask"] = torch.ones(_BATCH, _OLDER + _LENGTH, dtype=torch.int64)
    taken["attention_mask"][-1, :2] = 0
    inputs: dict[str, Axes] = {"input_ids": _TOKENS, "attention_mask": {0: "batch", 1: "total"}}
    outputs: dict[str, Axes] = {"logits": _TOKENS}
    for one in cache:
        inputs[PAST + one.name] = {0: "batch", 2: "past"}
        outputs[PRESENT + one.name] = {0: "batch", 2: "total"}
        taken[PAST + one.name] = torch.zeros(_BATCH, one.heads, _OLDER, one.width)
    return Plan("decoder", (Call("model", "model.onnx", inputs, outputs, taken, compute, _LENGTH),), cache)


def _encoder_decoder(model: nn.Module) -> Plan:
    text = sample(model, _BATCH, _TEXT, padded=2)
    text = {name: text[name] for name in ("input_ids", "attention_mask")}

    def encode(model: nn.Module, given: Tensors) -> tuple[torch.Tensor, ...]:
        """The decoder runs one token: of that the exporter keeps what makes the keys and values of cross attention."""
        hidden = _encoder(model)(input_ids=given["input_ids"], attention_mask=given["attention_mask"])[0]
        past = _both([], [])
        _decode(model, hidden, given["attention_mask"], torch.zeros_like(given["input_ids"][:, :1]), past)
        return (hidden, *_tensors(past.cross_attention_cache))

    with torch.no_grad():
        hidden, *crossed = encode(model, text)
        past = _both([], [])
        _decode(model, hidden, text["attention_mask"], text["input_ids"], past)
        own = _described(model, past.self_attention_cache, "decoder")
        cross = _described(model, past.cross_attention_cache, "encoder")
    width = hidden.shape[-1]

    def decode(model: nn.Module, given: Tensors) -> tuple[torch.Tensor, ...]:
        mask = given["encoder_attention_mask"]
        past = _both(*([given[PAST + one.name] for one in tensors] for tensors in (own, cross)))
        # Cross attention has its keys and values: of this only the shape is asked for.
        nothing = torch.zeros(mask.shape[0], mask.shape[1], width, device=mask.device)
        logits = _decode(model, nothing, mask, given["input_ids"], past)
        return (logits, *_tensors(past.self_attention_cache))

    known: Axes = {0: "batch", 1: "text"}
    first = Call(
        "encoder", "encoder_model.onnx", dict.fromkeys(text, known),
        {"last_hidden_state": known, **{PRESENT + one.name: {0: "batch", 2: "text"} for one in cross}},
        text, encode, _TEXT,
    )  # fmt: skip
    taken = {
        "input_ids": sample(model, _BATCH, _LENGTH)["input_ids"],
        "encoder_attention_mask": text["attention_mask"],
        **{PAST + one.name: torch.zeros(_BATCH, one.heads, _OLDER, one.width) for one in own},
        **{PAST + one.name: tensor for one, tensor in zip(cross, crossed, strict=True)},
    }
    inputs: dict[str, Axes] = {"input_ids": _TOKENS, "encoder_attention_mask": known}
    inputs |= {PAST + one.name: {0: "batch", 2: "past"} for one in own}
    inputs |= {PAST + one.name: {0: "batch", 2: "text"} for one in cross}
    outputs: dict[str, Axes] = {"logits": _TOKENS, **{PRESENT + one.name: {0: "batch", 2: "total"} for one in own}}
    second = Call("decoder", "decoder_model.onnx", inputs, outputs, taken, decode, _LENGTH)
    return Plan("encoder-decoder", (first, second), (*own, *cross))


def _encoder(model: Any) -> nn.Module:
    found: nn.Module = model.get_encoder()
    return found


def _decode(model: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, past: Any) -> torch.Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    found: torch.Tensor = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        attention_mask=mask,
        decoder_input_ids=ids,
        past_key_values=past,
        use_cache=True,
    )["logits"]
    return found


def _cache(tensors: Sequence[torch.Tensor]) -> Any:
    """A growing cache that holds keys and values of each layer in turn."""
    from transformers.cache_utils import DynamicCache

    found = DynamicCache()
    for layer, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        found.update(keys, values, layer)
    return found


def _both(own: Sequence[torch.Tensor], cross: Sequence[torch.Tensor]) -> Any:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    found = EncoderDecoderCache(DynamicCache(), DynamicCache())
    found.self_attention_cache, found.cross_attention_cache = _cache(own), _cache(cross)
    found.is_updated = {layer: bool(cross) for layer in range(max(len(cross) // 2, 1))}
    return found


def _tensors(cache: Any) -> tuple[torch.Tensor, ...]:
    if hasattr(cache, "layers"):
        return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    pairs = zip(cache.key_cache, cache.value_cache, strict=True)  # transformers before 4.54
    return tuple(tensor for pair in pairs for tensor in pair)


def _described(model: nn.Module, cache: Any, kind: str = "") -> tuple[CacheTensor, ...]:
    try:
        found = _tensors(cache)
    except AttributeError:
        found = ()
    if not found or any(not isinstance(one, torch.Tensor) or one.ndim != 4 for one in found):
        raise MismatchError(
            f"{type(model).__name__} cannot be exported: expected keys and values [batch, heads, tokens, width] in each layer's cache, found "
            f"a {type(cache).__name__} of something else; serve this model with PyTorch"
        )
    middle = f".{kind}" if kind else ""
    return tuple(
        CacheTensor(
            name=f"{number // 2}{middle}.{'value' if number % 2 else 'key'}",
            heads=one.shape[1], width=one.shape[3], cross=kind == "encoder",
        )
        for number, one in enumerate(found)
    )  # fmt: skip


def _accepted(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
