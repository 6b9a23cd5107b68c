"""Which rows of its last layer a model's head reads, and which modules of that layer need compute no others.

A module that treats each token by itself (a linear layer, an FFN) may be given the read rows alone. Attention may not: it needs the
keys and values of every token, so it runs whole, with its own masks, positions, cache and kernel; only its query and output
projections are among the modules named here. Nothing is assumed about the order of norms and residuals in a layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite, final_ffn, linear_shape
from xpatch.models.heads import last_tokens
from xpatch.patches.weights import innermost

#: `config.model_type` of the families whose layers are known, by the shape of the layer.
BERT_LIKE = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
DISTILBERT_LIKE = ("distilbert",)
DECODERS = (
    "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
    "llama", "mistral", "nemotron", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
_ATTENTIONS = ("self_attn", "self_attention", "attention", "attn")
_MIXES = re.compile("Conv|Pool|RNN|LSTM|GRU|Attention|Transformer")
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")

_EVERY_ROW: ContextVar[bool] = ContextVar("xpatch_every_row", default=False)


@contextmanager
def every_row() -> Iterator[None]:
    """Within this context (this thread or task) optimised models compute every row, for code that looks inside them."""
    token = _EVERY_ROW.set(True)
    try:
        yield
    finally:
        _EVERY_ROW.reset(token)


def is_every_row_asked_for() -> bool:
    return _EVERY_ROW.get()


class Kept:
    """R of the T rows of each of B inputs.

    tokens: `[B, T]` or `[B, T, D]`, the call's own (a compiled graph follows the sizes of a tensor, and would be made anew for every
    number). index: a slice or positions `[R]`, the same for every input, or positions `[B, R]`. count: R, less than T.
    """

    def __init__(self, tokens: torch.Tensor, count: int, index: slice | torch.Tensor) -> None:
        self.tokens = tokens
        self.count = count
        self.index = index

    def fits(self, x: Any) -> bool:
        """Whether x is `[B, T, D]`."""
        return isinstance(x, torch.Tensor) and x.ndim == 3 and x.shape[:2] == self.tokens.shape[:2]

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, T, D]` -> its rows `[B, R, D]`."""
        return x[self._where(x)].contiguous()  # GPT-2 takes views of it

    def is_narrow(self, y: Any) -> bool:
        """Whether y is `[B, R, D]`."""
        return (
            isinstance(y, torch.Tensor)
            and y.ndim == 3
            and y.shape[1] == self.count
            and y.shape[0] == self.tokens.shape[0]
        )

    def widen(self, y: torch.Tensor) -> torch.Tensor:
        """y `[B, R, D]` -> `[B, T, D]` with those rows in their places. The others are never read: they are copies or zero."""
        batch, length = self.tokens.shape[:2]
        if self.count == 1:
            return y.expand(-1, length, -1).contiguous()
        if isinstance(self.index, slice):
            return F.pad(y, (0, 0, length - self.count, 0))
        wide = y.new_zeros(batch, length, y.shape[-1])
        wide[self._where(y)] = y
        return wide

    def _where(self, x: torch.Tensor) -> Any:
        if isinstance(self.index, slice):
            return slice(None), self.index
        index = self.index.to(x.device)
        if index.ndim == 1:
            return slice(None), index
        return torch.arange(x.shape[0], device=x.device).unsqueeze(1), index


@dataclass(frozen=True)
class Segment:
    """Modules in a row that treat each token by itself: from the inputs of `narrow` to the output of `widen` (dotted names, often
    the same one) only the read rows are computed. Between the two, no row is used elsewhere."""

    narrow: str
    widen: str


@dataclass(frozen=True)
class Reader:
    """How a model's head reads its last layer.

    reads: "first" token; "last" token that is not padding, as transformers finds it; the positions "kept" for logits, where a call
    names them (`generate` does). layer: dotted name of the last layer. segments: of that layer. arguments: of the model's forward.
    """

    reads: str
    layer: str
    segments: tuple[Segment, ...]
    arguments: tuple[str, ...]

    def kept(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kept | None:
        """The rows this call of `model` needs, or None where it needs all, or it cannot be told: hidden states or attentions are
        asked for, a loss over every position, an input of another form."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs} if args else kwargs
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if ids is not None else embedded
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != (2 if ids is not None else 3) or tokens.shape[1] < 2:
            return None
        config: Any = model.config
        for name, value in given.items():
            if name.startswith("output_") and value is not None and value is not False:
                return None
        for name in ("output_hidden_states", "output_attentions"):
            if given.get(name) is None and getattr(config, name, False):
                return None
        if self.reads == "kept":
            return _kept_logits(given, tokens)
        return self.one(model, tokens, ids)

    def one(self, model: nn.Module, tokens: torch.Tensor, ids: torch.Tensor | None) -> Kept:
        """The one row of each input that a classifier reads. tokens: ids or embeddings; ids `[B, T]`, where the call has them."""
        if self.reads == "first":
            return Kept(tokens, 1, slice(0, 1))
        config: Any = model.config
        padding = _text(config).pad_token_id
        if padding is None or ids is None:
            return Kept(tokens, 1, slice(-1, None))
        return Kept(tokens, 1, last_tokens(ids != padding).unsqueeze(1))


def reader_of(model: nn.Module) -> Reader:
    """How the head of `model` reads. Raises `MismatchError` with what was found where that is not known."""
    config: Any = getattr(model, "config", None)
    kind, name = getattr(_text(config), "model_type", None), type(model).__name__
    classifier, decoder = name.endswith("ForSequenceClassification"), name.endswith(("ForCausalLM", "LMHeadModel"))
    if getattr(config, "is_encoder_decoder", False) or not (classifier or decoder):
        raise _unknown(model, f"a {name}")
    arguments = tuple(inspect.signature(type(model).forward).parameters)[1:]
    if decoder and (kind not in DECODERS or "logits_to_keep" not in arguments):
        raise _unknown(model, f"a {name} of model type {kind!r}, " + _not_told("logits_to_keep" in arguments))
    if kind not in (*BERT_LIKE, *DISTILBERT_LIKE, *DECODERS):
        raise _unknown(model, f"a classifier of model type {kind!r}")
    site = final_ffn(model)
    layer, segments = _segments(model, site, str(kind))
    stack = model.get_submodule(layer.rpartition(".")[0])
    layers = getattr(_text(config), "num_hidden_layers", None)
    if not isinstance(stack, nn.ModuleList) or len(stack) != layers or stack[-1] is not model.get_submodule(layer):
        raise _unknown(model, f"{layer!r}, which is not the last of {layers} layers")
    attention = segments[0].narrow.rpartition(".")[0]
    base = getattr(model, "base_model", model)
    known = [model, base, model.get_submodule(layer), model.get_submodule(attention)]
    for module in (*known, *_behind_the_layers(model), *(_behind_the_layers(base) if base is not model else ())):
        if not _is_transformers_own(innermost(module)):
            home = type(module).forward.__module__
            raise _unknown(model, f"a {type(module).__name__} whose forward ({home}) may read other rows")
    return Reader("kept" if decoder else "last" if kind in DECODERS else "first", layer, segments, arguments)


def _segments(model: nn.Module, site: FFNSite, kind: str) -> tuple[str, tuple[Segment, ...]]:
    """The last layer and its segments. Raises `MismatchError` where the layer is not built as its family's are."""
    if site.experts or site.uses != 1:
        raise _unknown(model, f"{site.name!r}, a mixture of experts or a layer that runs {site.uses} times")
    if kind in BERT_LIKE:
        layer = site.name
        names = [("attention.self.query",) * 2, ("attention.output", "output")]
        parts = {"attention", "intermediate", "output"}
    elif kind in DISTILBERT_LIKE:
        layer = site.name.rpartition(".")[0]
        names = [("attention.q_lin",) * 2, ("attention.out_lin",) * 2, ("sa_layer_norm", "output_layer_norm")]
        parts = {"attention", "sa_layer_norm", "ffn", "output_layer_norm"}
    else:
        layer, _, ffn = site.name.rpartition(".")
        block = model.get_submodule(layer)
        attention = next((name for name in _ATTENTIONS if name in block._modules), "")
        inside = getattr(block, attention)._modules if attention else {}
        output = next((name for name in _OUTPUTS if name in inside), "")
        chosen = [f"{attention}.{output}", *([f"{attention}.q_proj"] if "q_proj" in inside else [])]
        names = [(name, name) for name in [*chosen, ffn]]
        parts = {attention, ffn} if output else {"an attention with an output projection"}
    block = model.get_submodule(layer)
    found = {name for name, _ in block.named_children()}
    if not parts <= found or any("cross" in name for name in found):
        raise _unknown(
            model, f"{layer!r} with {', '.join(sorted(found))} where {', '.join(sorted(parts))} was expected"
        )
    for first, last in names:
        for name in (first, last):
            try:
                module = block.get_submodule(name)
            except AttributeError:
                raise _unknown(model, f"{layer!r} without {name!r}") from None
            if "." in name and name != "attention.output" and linear_shape(module) is None:
                raise _unknown(model, f"{layer}.{name}, a {type(module).__name__}, where a linear layer was expected")
    if any(getattr(module, "chunk_size_feed_forward", 0) for module in block.modules()):
        raise _unknown(model, f"{layer!r}, whose FFN runs in chunks (chunk_size_feed_forward)")
    return layer, tuple(Segment(f"{layer}.{first}", f"{layer}.{last}") for first, last in names)


def _behind_the_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Poolers, norms and heads, with what is inside them; not the layers and what holds them."""
    for child in model.children():
        if not any(isinstance(inner, (nn.ModuleList, nn.Embedding)) for inner in child.modules()):
            yield from child.modules()


def _is_transformers_own(module: nn.Module) -> bool:
    """Whether a module computes as transformers has it. Linear layers may be anyone's: they treat each row by itself."""
    if linear_shape(module) is not None:
        return True
    own = vars(module).get("forward")  # of torch.compile and accelerate, which hand on to the class's
    if own is not None and not hasattr(own, "_torchdynamo_orig_callable") and "_old_forward" not in vars(module):
        return False
    home, name = str(type(module).forward.__module__), type(module).__name__
    return home.startswith("transformers.") or (home.startswith("torch.nn.") and not _MIXES.search(name))


def _kept_logits(given: Mapping[str, Any], tokens: torch.Tensor) -> Kept | None:
    keep, length = given.get("logits_to_keep"), tokens.shape[1]
    if given.get("labels") is not None or keep is None or isinstance(keep, bool):
        return None
    if isinstance(keep, int):
        return Kept(tokens, keep, slice(-keep, None)) if 0 < keep < length else None
    # Two axes mean different things in different versions of transformers. Positions may name a row twice, which would count its
    # gradient twice.
    if not isinstance(keep, torch.Tensor) or keep.dtype is not torch.int64 or keep.ndim != 1 or torch.is_grad_enabled():
        return None
    return Kept(tokens, keep.shape[0], keep) if 0 < keep.shape[0] < length else None


def _text(config: Any) -> Any:
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _not_told(accepted: bool) -> str:
    return "whose layers are not known" if accepted else "whose forward takes no logits_to_keep"


def _unknown(model: nn.Module, found: str) -> MismatchError:
    known = ", ".join(sorted((*BERT_LIKE, *DISTILBERT_LIKE, *DECODERS)))
    return MismatchError(
        f"optimize: which rows the head of {type(model).__name__} reads is not known; found {found}. Known are sequence classifiers of "
        f"transformers ({known}) and its causal language models of the decoders among them; leave this model as it is"
    )
