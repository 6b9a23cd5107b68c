"""Modules that stand in front of a model: `torch.compile`, data parallelism, PEFT. Patches go on what is behind them."""

from __future__ import annotations

from typing import Any

from torch import nn

from xpatch.patches.weights import COMPILED, innermost


def unwrapped(model: Any) -> Any:
    """The model behind `torch.compile(model)`, `DataParallel`, `DistributedDataParallel` and `PeftModel`, in any nesting.

    Adapters stay in place: in a PEFT model the base model's own modules hold them. Anything else is returned as it is.
    """
    return innermost(model) if isinstance(model, nn.Module) else model


def plain_name(name: str) -> str:
    """A module's dotted name as it was before a part of the model was compiled: "encoder._orig_mod.layer.0" -> "encoder.layer.0"."""
    return ".".join(word for word in name.split(".") if word != COMPILED)
