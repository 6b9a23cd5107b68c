"""Batched predictions of a sequence classifier on single texts and text pairs, longest texts first.

Axes: `B` batch rows, `T` tokens, `C` classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from xpatch.errors import MismatchError
from xpatch.models.lm_heads import lm_kind
from xpatch.patches.requests import Probe
from xpatch.runtime.routing import rows as routed


def predict(model: Any, tokenizer: Any, probes: Sequence[Probe | str], *, batch_size: int = 256) -> list[str]:
    """The label a classifier gives each probe, in the order given, as named by `model.config.id2label`.

    The model runs in eval mode without gradients, on its own device, with whatever patches it carries; its training mode is
    put back afterwards. Raises `MismatchError` when the model is no sequence classifier.
    """
    names = label_names(model)
    return [names[index] for index in predict_indices(model, tokenizer, probes, batch_size=batch_size)]


def predict_indices(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe | str],
    *,
    batch_size: int = 256,
    languages: Sequence[str] | None = None,
) -> np.ndarray:
    """As `predict`, but class indices: int64 `[len(probes)]`. languages: one code a probe, for patches with language masks."""
    label_names(model)
    if languages is not None and len(languages) != len(probes):
        raise ValueError(f"expected one language a probe, found {len(languages)} for {len(probes)} probes")
    found = np.zeros(len(probes), dtype=np.int64)
    with evaluating(model), torch.no_grad():
        for rows, inputs in batches(model, tokenizer, probes, batch_size=batch_size):
            with spoken(None if languages is None else [languages[row] for row in rows]):
                logits = getattr(model(**inputs), "logits", None)
            if logits is None or logits.ndim != 2:
                raise MismatchError(
                    f"{type(model).__name__} gives {'no logits' if logits is None else f'logits of shape {tuple(logits.shape)}'}; "
                    "expected [B, C] class logits; evaluation needs a sequence classifier"
                )
            found[rows] = logits.argmax(-1).cpu().numpy()
    return found


def batches(
    model: Any, tokenizer: Any, probes: Sequence[Probe | str], *, batch_size: int = 256
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Yield `(positions [B], model inputs [B, T])`, sorted by length so that little is padding; longest first.

    Texts are truncated to what the model has positions for. A model without a padding token is fed one text at a time.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    items = [probe if isinstance(probe, Probe) else Probe(text=probe) for probe in probes]
    if not items:
        return
    pairs = [item.text_pair is not None for item in items]
    limit = max_length(model, tokenizer)
    encoded: list[dict[str, list[int]]] = [{} for _ in items]
    for paired in (False, True):  # tokenizers take texts or pairs in one call, not a mixture
        rows = [row for row, pair in enumerate(pairs) if pair is paired]
        if not rows:
            continue
        second = [items[row].text_pair for row in rows] if paired else None
        fields = tokenizer([items[row].text for row in rows], second, truncation=True, max_length=limit)
        for position, row in enumerate(rows):
            encoded[row] = {name: values[position] for name, values in fields.items()}
    order = sorted(range(len(items)), key=lambda row: -len(encoded[row]["input_ids"]))
    padded = getattr(model.config, "pad_token_id", None) is not None and tokenizer.pad_token_id is not None
    step = batch_size if padded else 1
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        chosen = [encoded[row] for row in rows]
        if padded:
            inputs = dict(
                tokenizer.pad({name: [one[name] for one in chosen] for name in chosen[0]}, return_tensors="pt")
            )
        else:
            inputs = {name: torch.tensor([values]) for name, values in chosen[0].items()}
        yield np.array(rows), {name: tensor.to(model.device) for name, tensor in inputs.items()}


def max_length(model: Any, tokenizer: Any) -> int:
    """The longest input in tokens: the tokenizer's limit and the model's number of positions (RoBERTa's begin after padding)."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    if "roberta" in str(getattr(model.config, "model_type", "")):
        positions -= (getattr(model.config, "pad_token_id", None) or 0) + 1
    return int(min(tokenizer.model_max_length, positions))


def label_names(model: Any) -> list[str]:
    """The classifier's labels in the order of its logits. Raises `MismatchError` for a model without labels."""
    if lm_kind(model) is not None:  # its config has labels all the same
        raise MismatchError(
            f"{type(model).__name__} is a language model and answers with no label; expected a sequence classifier. Ask a language model "
            "with xpatch.evaluate, or its own generate"
        )
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    if not id2label or not hasattr(model, "num_labels"):
        raise MismatchError(
            f"{type(model).__name__} has no labels (config.id2label); evaluation needs a sequence classifier, "
            "for instance BertForSequenceClassification"
        )
    return [str(id2label[index]) for index in sorted(id2label)]


def label_index(model: Any, target: str, *, where: str = "target") -> int:
    """A label's class index; the index itself, as a string, is accepted. Raises `MismatchError` listing the known labels."""
    names = label_names(model)
    if target in names:
        return names.index(target)
    if target.isdecimal() and int(target) < len(names):
        return int(target)
    raise MismatchError(f"{where}: label {target!r} is not one of the model's labels {names}; correct the target")


def spoken(languages: Sequence[str] | None) -> contextlib.AbstractContextManager[Any]:
    """`xpatch.rows(languages=...)`; with None whatever the caller's context says stays."""
    return contextlib.nullcontext() if languages is None else routed(languages=languages)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for every module, each module's own mode put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
