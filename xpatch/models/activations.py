"""Which activation an FFN has: by its values where its function is found, else by its name in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from xpatch.models.linears import linear_shape

_IN_CONFIG = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
_KNOWN_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "linear": "identity",
}


def activation_of(holder: nn.Module, model: nn.Module) -> str:
    """One of `xpatch.patches.types.ACTIVATIONS`, or the model's own name for another one; "unknown" without a name.

    holder: the module that holds the FFN's linears. Needs no weights: a model on the meta device gives the same answer.
    """
    for function in _functions(holder):
        name = recognise(function)
        if name is not None:
            return name
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    for source in (text() if callable(text) else config, config):
        for field in _IN_CONFIG:
            value = getattr(source, field, None)
            if isinstance(value, str):
                return _KNOWN_NAMES.get(value, value)
    return "unknown"


def recognise(function: Callable[[torch.Tensor], Any]) -> str | None:
    """The activation whose values `function` has on a grid, or None."""
    with torch.device("cpu"):  # also where the caller makes models on the meta device
        grid = torch.linspace(-4, 4, 81, dtype=torch.float64)
        known = {
            "relu": F.relu(grid),
            "gelu": F.gelu(grid),
            "gelu_tanh": F.gelu(grid, approximate="tanh"),
            "silu": F.silu(grid),
            "identity": grid,
        }
        try:
            with torch.no_grad():
                values = function(grid)
        except Exception:  # not a function of one tensor: not an activation
            return None
    if not isinstance(values, torch.Tensor) or values.shape != grid.shape:
        return None
    for name, expected in known.items():
        if torch.allclose(values.to(torch.float64), expected, atol=1e-6):
            return name
    return None


def _functions(holder: nn.Module) -> Iterator[Callable[[torch.Tensor], Any]]:
    """Functions kept under a name with "act", and modules without parameters, outside attention and linear layers."""
    inside: list[str] = []
    for path, module in holder.named_modules():
        if "attention" in path.lower() or "attn" in path.lower() or path.startswith(tuple(inside)):
            continue
        if linear_shape(module) is not None:
            inside.append(f"{path}.")
            continue
        for name, value in vars(module).items():
            if "act" in name and callable(value):
                yield value
        bare = not any(True for _ in module.parameters()) and not any(True for _ in module.children())
        if bare and "dropout" not in type(module).__name__.lower() and not isinstance(module, nn.Identity):
            yield module
