"""How long an input may be."""

from __future__ import annotations

from typing import Any

_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert"}  # positions start after the padding index


def length_limit(model: Any, tokenizer: Any) -> int | None:
    """The longest input in tokens that both the tokenizer and the position embeddings allow; None where neither says."""
    limits = []
    if 0 < getattr(tokenizer, "model_max_length", 0) < 1_000_000:
        limits.append(int(tokenizer.model_max_length))
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        if config.model_type in _OFFSET_POSITIONS:
            positions -= (config.pad_token_id or 0) + 1
        limits.append(positions)
    return min(limits) if limits else None
