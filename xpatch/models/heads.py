"""What a sequence classifier computes after its final FFN, for the rows its head reads alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite, final_ffn, linear_shape


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a sequence classifier, as two steps.

    read_rows(hidden `[B, T, D]`, attention_mask `[B, T]` or None) -> `[B, D]`: the rows the head reads.
    tail(ffn_output `[M, D]`, residual `[M, D]`) -> logits `[M, C]`: everything after the final FFN's down projection for such
    rows, with the model's own modules (differentiable; put the model in eval mode, it may hold dropout).

    site: the final FFN. residual_from: dotted name of the module whose input is the residual. labels: C.
    reads: "first" token or "last" token that is not padding.
    """

    site: FFNSite
    residual_from: str
    reads: str
    labels: int
    tail: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def read_rows(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """hidden `[B, T, D]`, attention_mask `[B, T]` (1 = a token) -> `[B, D]`."""
        if self.reads == "first":
            return hidden[:, 0]
        batch = torch.arange(hidden.shape[0], device=hidden.device)
        if attention_mask is None:
            return hidden[:, -1]
        return hidden[batch, last_tokens(attention_mask.to(hidden.device))]


def last_tokens(attention_mask: torch.Tensor) -> torch.Tensor:
    """attention_mask `[B, T]` (1 = a token) -> `[B]` int64: where the last token is; 0 in a row without any."""
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.bool() * position).argmax(-1)


def head_of(model: nn.Module) -> Head:
    """The head of a sequence classifier: BERT, ELECTRA-like and XLM-R/RoBERTa, DistilBERT, and pre-norm decoders such as GPT-2.

    Raises `MismatchError` with what was found for any other model.
    """
    site = final_ffn(model)
    for find in (_bert, _roberta, _distilbert, _decoder):
        head = find(model, site)
        if head is not None:
            return head
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
    raise MismatchError(
        f"{type(model).__name__} is not a sequence classifier whose head is known: expected an encoder with a pooler and a "
        f"classifier (BERT, XLM-R, DistilBERT) or a pre-norm decoder with a final norm and `score` (GPT-2); found {children}. "
        "Load it with AutoModelForSequenceClassification"
    )


def _bert(model: nn.Module, site: FFNSite) -> Head | None:
    base, norm = _base(model), _norm_after(model, site)
    pooler, classifier = getattr(base, "pooler", None), getattr(model, "classifier", None)
    if norm is None or not isinstance(pooler, nn.Module) or classifier is None or linear_shape(classifier) is None:
        return None

    def tail(ffn_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return classifier(pooler(norm(ffn_output + residual).unsqueeze(1)))

    return Head(site, site.up, "first", _labels(classifier), tail)


def _roberta(model: nn.Module, site: FFNSite) -> Head | None:
    norm, classifier = _norm_after(model, site), getattr(model, "classifier", None)
    out_proj = getattr(classifier, "out_proj", None)
    if norm is None or classifier is None or not hasattr(classifier, "dense") or out_proj is None:
        return None

    def tail(ffn_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return classifier(norm(ffn_output + residual).unsqueeze(1))

    return Head(site, site.up, "first", _labels(out_proj), tail)


def _distilbert(model: nn.Module, site: FFNSite) -> Head | None:
    before, classifier = getattr(model, "pre_classifier", None), getattr(model, "classifier", None)
    block = model.get_submodule(site.name.rpartition(".")[0])
    norm = getattr(block, "output_layer_norm", None)
    if before is None or classifier is None or norm is None:
        return None

    def tail(ffn_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return classifier(torch.relu(before(norm(ffn_output + residual))))

    return Head(site, site.up, "first", _labels(classifier), tail)


def _decoder(model: nn.Module, site: FFNSite) -> Head | None:
    score, base = getattr(model, "score", None), _base(model)
    if score is None or base is None or linear_shape(score) is None:
        return None
    final = [child for child in base.children() if _is_norm(child)]
    block_name = site.name.rpartition(".")[0]
    norms = [
        f"{block_name}.{name}" for name, child in model.get_submodule(block_name).named_children() if _is_norm(child)
    ]
    # Two norms in a block: the second one feeds the FFN and its input is the residual. More (Gemma 2) is another computation.
    if not final or len(norms) != 2:
        return None
    norm = final[-1]

    def tail(ffn_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return score(norm(ffn_output + residual))

    return Head(site, norms[1], "last", _labels(score), tail)


def _base(model: nn.Module) -> nn.Module | None:
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) and base is not model else None


def _norm_after(model: nn.Module, site: FFNSite) -> nn.Module | None:
    """The LayerNorm beside the down projection, which makes it a post-norm block (BERT's `output`)."""
    holder = model.get_submodule(site.down.rpartition(".")[0])
    norm = getattr(holder, "LayerNorm", None)
    return norm if isinstance(norm, nn.Module) else None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _labels(layer: nn.Module) -> int:
    shape = linear_shape(layer)
    assert shape is not None  # checked by the callers, which chose this layer for its shape
    return shape[1]
