"""How long an input may be."""

from __future__ import annotations

from typing import Any

from torch import nn


def position_limit(model: nn.Module) -> int | None:
    """The longest input, in tokens, that a model's positions allow; None where there is no such limit, or it is unknown."""
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None and getattr(config, "relative_attention_num_buckets", None) is None:  # T5's positions have no end
        limit = getattr(config, "n_positions", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # RoBERTa counts positions from behind the padding index, and so has fewer than its table has rows.
    padded = [
        module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return limit - (padded[0] + 1 if padded else 0)


def length_limit(model: nn.Module, tokenizer: Any) -> int | None:
    """The longest input, in tokens, that both the tokenizer and the model's positions allow; None where neither says."""
    limits = [limit for limit in (position_limit(model),) if limit is not None]
    if 0 < getattr(tokenizer, "model_max_length", 0) < 1_000_000:
        limits.append(int(tokenizer.model_max_length))
    return min(limits) if limits else None
