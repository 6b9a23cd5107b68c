"""Modules that stand in front of a model: `torch.compile`, data parallelism, PEFT. Patches go on what is behind them."""

from __future__ import annotations

from typing import Any

from torch import nn

_COMPILED = "_orig_mod"


def unwrapped(model: Any) -> Any:
    """The model behind `torch.compile(model)`, `DataParallel`, `DistributedDataParallel` and `PeftModel`, in any nesting.

    Adapters stay in place: in a PEFT model the base model's own modules hold them. Anything else is returned as it is.
    """
    seen: set[int] = set()
    while isinstance(model, nn.Module) and id(model) not in seen:
        seen.add(id(model))
        if isinstance(model._modules.get(_COMPILED), nn.Module):
            model = model._modules[_COMPILED]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(type(model), "get_base_model") and "base_model" in model._modules:
            model = model.get_base_model()  # type: ignore[operator]
    return model


def plain_name(name: str) -> str:
    """A module's dotted name as it was before a part of the model was compiled: "encoder._orig_mod.layer.0" -> "encoder.layer.0"."""
    return ".".join(word for word in name.split(".") if word != _COMPILED)
