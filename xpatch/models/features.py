"""What the editors train on: the input, output and residual of the final FFN at the rows the head reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite
from xpatch.models.heads import Head, head_of
from xpatch.models.readers import every_row
from xpatch.models.surgery import Surgery


@dataclass(frozen=True, eq=False)
class Features:
    """Rows of one batch: x `[B, D]` enters the FFN, base `[B, D]` leaves its down projection, residual `[B, D]` is added to it.

    `head.tail(base, residual)` gives `logits` `[B, C]`.
    """

    x: torch.Tensor
    residual: torch.Tensor
    base: torch.Tensor
    logits: torch.Tensor


def capture(model: nn.Module, inputs: Mapping[str, Any], site: FFNSite | str | None = None) -> Features:
    """One forward of a sequence classifier in eval mode without gradients, and the rows its head reads at its final FFN.

    inputs: the keyword arguments of `model` for one batch (token ids, attention mask ...). The model is left as it was; it is
    captured as it answers now, patches included. Raises `MismatchError` for a site that is not the final FFN, a model whose
    head is not known, or one whose logits do not follow from the captured rows.
    """
    head = head_of(model)
    name = site if isinstance(site, str) else head.site.name if site is None else site.name
    if name != head.site.name:
        raise MismatchError(f"rows are captured at the final FFN, {head.site.name!r}; found {name!r}")
    seen: dict[str, torch.Tensor] = {}
    training = [module for module in model.modules() if module.training]

    def keep_input(key: str) -> Any:
        return lambda module, args: seen.__setitem__(key, args[0])

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        seen["base"] = output[0] if isinstance(output, tuple) else output  # of a mixture that also returns its choice

    with Surgery() as surgery, torch.no_grad(), every_row():
        surgery.before(model.get_submodule(head.site.up), keep_input("x"))
        if head.residual_from != head.site.up:
            surgery.before(model.get_submodule(head.residual_from), keep_input("residual"))
        surgery.after(model.get_submodule(head.site.down), keep_output)
        try:
            for module in training:
                module.training = False
            output = model(**inputs)
            logits = output["logits"] if isinstance(output, Mapping) else output[0]
            seen.setdefault("residual", seen["x"])
            mask = _tokens(model, head, inputs)
            rows = {key: head.read_rows(value, mask).clone() for key, value in seen.items()}
            _check(model, head, rows, logits)
        finally:
            for module in training:
                module.training = True
    return Features(x=rows["x"], residual=rows["residual"], base=rows["base"], logits=logits)


def _tokens(model: nn.Module, head: Head, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """`[B, T]`, 1 where the head counts a token: Hugging Face decoders go by the padding id, not by the attention mask."""
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    ids = inputs.get("input_ids")
    if head.reads == "last" and padding is not None and ids is not None:
        return ids != padding
    return inputs.get("attention_mask")


def _check(model: nn.Module, head: Head, rows: Mapping[str, torch.Tensor], logits: torch.Tensor) -> None:
    again = head.tail(rows["base"], rows["residual"])
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    scale = 1.0 + float(logits.abs().max())
    difference = float((again - logits).abs().max())
    if again.shape != logits.shape or not difference <= tolerance * scale:
        raise MismatchError(
            f"the head of {type(model).__name__} is not what its structure suggests: its logits {tuple(logits.shape)} differ by "
            f"{difference:.3g} from those computed from its final FFN {head.site.name!r}; this model cannot be edited through its head"
        )
