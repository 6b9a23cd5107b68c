"""Proof that a removed patch leaves nothing: every byte of the model, and of its answers, is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xpatch.patches.requests import EditRequest


def state_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer (also those that are not saved) as raw bytes: name -> bytes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: raw_bytes(tensor) for name, tensor in tensors.items()}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's elements as they lie in memory, any dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def logits(model: Any, tokenizer: Any, requests: Sequence[EditRequest]) -> torch.Tensor:
    """fp32 `[M, C]`: the logits of every version of every request, in a fixed order and in fixed batches."""
    texts = [version.text for request in requests for version in request.versions.values()]
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            rows.append(model(**batch.to(model.device)).logits.float().cpu())
    return torch.cat(rows)


class Witness:
    """Takes down a model's bytes and answers; `restored` compares them with those of the model as it is now."""

    def __init__(self, model: Any, tokenizer: Any, requests: Sequence[EditRequest]) -> None:
        self._arguments = (model, tokenizer, requests)
        self.state = state_bytes(model)
        self.logits = logits(*self._arguments)

    @property
    def bytes_compared(self) -> int:
        """How much `restored` looks at."""
        return sum(len(value) for value in self.state.values()) + len(raw_bytes(self.logits))

    def restored(self) -> bool:
        """Whether every parameter, buffer and logit has the bytes it had, and none was added or taken away."""
        return state_bytes(self._arguments[0]) == self.state and raw_bytes(logits(*self._arguments)) == raw_bytes(
            self.logits
        )
