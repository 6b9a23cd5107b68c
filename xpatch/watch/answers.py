"""Where a model's answer is, and what it is called: a class label, or the token at the masked or the last position.

Axes: `B` batch, `T` tokens, `C` classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xpatch.errors import MismatchError
from xpatch.evaluation.predict import label_names
from xpatch.models.anatomy import final_ffn
from xpatch.models.heads import Head, head_of


@dataclass(frozen=True)
class Answer:
    """A label (or token) and its probability."""

    label: str
    probability: float

    def __str__(self) -> str:
        return f"{self.label} {self.probability:.3f}"


class Reader:
    """Reads the answers of one model.

    A sequence classifier answers with the class logits. A language model answers with the token logits at the first mask token of
    the text, or at the last token where it has none; an encoder-decoder with those of the first decoded token.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.decodes = bool(getattr(model.config, "is_encoder_decoder", False))
        self._labels: list[str] | None = None
        self._head: Head | None = None
        try:
            self._head = head_of(model)
        except MismatchError:
            pass
        try:
            site = final_ffn(model)
            self.final = frozenset(name for name in (site.name, site.up, site.down, site.gate) if name)
        except MismatchError:
            self.final = frozenset()

    def complete(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs, with what a decoder begins with."""
        if not self.decodes or "decoder_input_ids" in inputs or not hasattr(self.model, "lm_head"):
            return dict(inputs)
        config = self.model.config
        start = getattr(config, "decoder_start_token_id", None)
        start = start if start is not None else getattr(config, "bos_token_id", None) or 0
        ids = inputs["input_ids"]
        return {**inputs, "decoder_input_ids": torch.full((ids.shape[0], 1), start, device=ids.device)}

    def read(self, output: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The answer's logits `[B, C]` in fp32, and the token `[B]` whose final hidden state they are computed from.

        The second is None where that is not one of the text's tokens, or not known. Raises `MismatchError` for a model without logits.
        """
        found = getattr(output, "logits", None)
        if not isinstance(found, torch.Tensor) or found.ndim not in (2, 3):
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else "none"
            raise MismatchError(
                f"{type(self.model).__name__}: expected logits [B, C] of a classifier or [B, T, C] of a language model, found {shape}; "
                "load the model with its head"
            )
        if found.ndim == 2:
            self._labels = self._labels or label_names(self.model)
            return found.float(), self._read_by_head(inputs)
        if self.decodes:
            return found[:, -1].float(), None
        position = self._masked_or_last(inputs)
        return found[torch.arange(found.shape[0], device=found.device), position.to(found.device)].float(), position

    def _read_by_head(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if self._head is None:
            return None
        ids, tokens = inputs["input_ids"], self.tokens(inputs)
        padding = getattr(self.model.config, "pad_token_id", None)
        if self._head.reads == "last" and padding is not None:  # Hugging Face decoders go by the padding id here
            tokens = ids != padding
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).unsqueeze(-1)
        return self._head.read_rows(places, tokens)[:, 0]

    def _masked_or_last(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        ids = inputs["input_ids"]
        last = (self.tokens(inputs) * torch.arange(ids.shape[1], device=ids.device)).argmax(-1)
        mask_token = getattr(self.tokenizer, "mask_token_id", None)
        if mask_token is None:
            return last
        masked = ids == mask_token
        return torch.where(masked.any(-1), masked.int().argmax(-1), last)

    def tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`[B, T]` bool: True for tokens, False for padding."""
        mask = inputs.get("attention_mask")
        return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    def name(self, index: int) -> str:
        """The label or token of one logit."""
        return self._labels[index] if self._labels is not None else str(self.tokenizer.convert_ids_to_tokens(index))

    def top(self, logits: torch.Tensor, count: int = 1) -> tuple[Answer, ...]:
        """The likeliest answers, best first: logits `[C]`."""
        best = logits.softmax(-1).topk(min(count, logits.shape[-1]))
        return tuple(
            Answer(self.name(int(index)), float(share)) for share, index in zip(best.values, best.indices, strict=True)
        )
