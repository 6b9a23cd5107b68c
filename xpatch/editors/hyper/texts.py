"""Texts as model inputs: encoded once, padded per batch, cut at the model's length limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xpatch.models.lengths import length_limit
from xpatch.patches.requests import Probe


class Encoder:
    """Probes -> a model's inputs `[B, T]`. `batched`: whether the model takes more than one text (it knows a padding token)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.limit = length_limit(model, tokenizer)
        self.batched = tokenizer.pad_token_id is not None and getattr(model.config, "pad_token_id", None) is not None
        self._known: dict[tuple[str, str | None], dict[str, list[int]]] = {}

    def __call__(self, probes: Sequence[Probe]) -> dict[str, torch.Tensor]:
        """One padded batch, in the order given."""
        rows = [self.encode(probe) for probe in probes]
        if len(rows) == 1:
            batch: Any = {name: torch.tensor([values]) for name, values in rows[0].items()}
        else:
            batch = self._tokenizer.pad({name: [row[name] for row in rows] for name in rows[0]}, return_tensors="pt")
        return {name: values.to(self.device) for name, values in batch.items()}

    def encode(self, probe: Probe) -> dict[str, list[int]]:
        """One text or pair as lists of numbers."""
        key = (probe.text, probe.text_pair)
        if key not in self._known:
            options: dict[str, Any] = {"truncation": True, "max_length": self.limit} if self.limit else {}
            encoded = self._tokenizer(probe.text, probe.text_pair, **options)
            names = [name for name in encoded if name in self._tokenizer.model_input_names]
            self._known[key] = {name: list(encoded[name]) for name in names}
        return self._known[key]

    def is_cut(self, probe: Probe) -> bool:
        """Whether a text reaches the length limit."""
        return self.limit is not None and len(self.encode(probe)["input_ids"]) >= self.limit
