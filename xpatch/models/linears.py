"""Linear layers by structure: which modules are one, how wide they are, and where a delta can stand beside one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.names import near


class Linear(NamedTuple):
    """One linear layer. name: its dotted path. inside, outside: D_in and D_out."""

    name: str
    module: nn.Module
    inside: int
    outside: int


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(D_in, D_out)` of a linear layer (nn.Linear, its quantised and adapted relatives, GPT-2's Conv1D); None for others.

    None too where nothing can be added to the output: a router chooses experts inside its own call, and the projection of
    nn.MultiheadAttention is read by a function and never called.
    """
    kind = type(module).__name__
    if "router" in kind.lower() or kind == "NonDynamicallyQuantizableLinear":
        return None
    inside, outside = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inside, int) and isinstance(outside, int):
        return inside, outside
    weight = getattr(module, "weight", None)
    if kind == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def linears(module: nn.Module, prefix: str = "") -> Iterator[Linear]:
    """Outermost linear layers in order of registration (an adapted layer counts once, a shared one under its first name)."""
    for name, child in module.named_children():
        shape = linear_shape(child)
        if shape is not None and not _is_only_read(module, name):
            yield Linear(f"{prefix}{name}", child, *shape)
        else:
            yield from linears(child, f"{prefix}{name}.")


def linear(model: nn.Module, name: str) -> tuple[nn.Module, int, int]:
    """The linear layer at the dotted `name`, with its `D_in` and `D_out`. Raises `MismatchError` listing the nearest names."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    shape = linear_shape(module) if module is not None and name else None
    holder, _, last = name.rpartition(".")
    if module is None or shape is None or _is_only_read(model.get_submodule(holder), last):
        found = _what(module) if shape is None else f"a {type(module).__name__} whose weight is read without a call"
        raise MismatchError(
            f"{type(model).__name__} has no linear layer named {name!r} (found {found}); linear layers are "
            f"{near(name, [other.name for other in linears(model)])}. `xpatch inspect --model DIR --linears` lists them"
        )
    return module, *shape


def _is_only_read(holder: nn.Module, name: str) -> bool:
    """Whether `holder` multiplies by the weight of its linear `name` without calling it: a delta beside it would do nothing.

    Mamba's mixers (Gu and Dao 2023) do so with `dt_proj`, BLOOM with two projections in its slow, exact mode.
    """
    if name == "dt_proj":
        return hasattr(holder, "A_log")
    exact = getattr(holder, "slow_but_exact", False) and getattr(holder, "pretraining_tp", 1) > 1
    return bool(exact) and name in ("dense", "dense_4h_to_h")


def _what(module: nn.Module | None) -> str:
    if module is None:
        return "no such module"
    kind = f"a {type(module).__name__}"
    if "router" in kind.lower():
        return f"{kind}: its choice of experts is made inside it, so nothing can be added to its output"
    if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
        return (
            f"{kind}: the weights of all experts in one parameter; patch neurons can stand beside its whole FFN instead"
        )
    if kind.endswith("NonDynamicallyQuantizableLinear"):
        return (
            f"{kind}: nn.MultiheadAttention reads its weight without calling it, so nothing can be added to its output"
        )
    return kind
