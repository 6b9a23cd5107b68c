"""Pure-torch maths of every patch form: the oracle in tests, and the implementation where no native kernel fits.

Axes: ``D`` input width, ``V`` output width, ``N`` neurons, ``R`` rank, ``L`` languages; ``...`` any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xpatch.errors import MismatchError

#: Canonical name -> function. The order is the native activation code.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda z: z,
}

_ALIASES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
    "linear": "identity",
}


def canonical_activation(name: str) -> str:
    """The canonical form of an activation's name (``gelu_new`` -> ``gelu_tanh``); unknown names raise MismatchError."""
    name = _ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        known = ", ".join([*ACTIVATIONS, *_ALIASES])
        raise MismatchError(f"patch_ffn: unknown activation {name!r}; known: {known}")
    return name


def activate(z: Tensor, activation: str) -> Tensor:
    """``act(z)``, elementwise, any shape and floating dtype."""
    return ACTIVATIONS[canonical_activation(activation)](z)


def activate_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """``grad * act'(z)``, elementwise; itself differentiable."""
    name = canonical_activation(activation)
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    if name == "silu":
        gate = torch.sigmoid(z)
        return grad * gate * (1 + z * (1 - gate))
    if name == "identity":
        return grad
    return torch.ops.aten.gelu_backward(grad, z, approximate="tanh" if name == "gelu_tanh" else "none")


def patch_ffn(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    mask_inner: Tensor | None = None,
    mask_outer: Tensor | None = None,
    language: Tensor | None = None,
) -> Tensor:
    """``act(x keysᵀ + bias) values``: x ``[..., D]``, keys ``[N, D]``, bias ``[N]``, values ``[N, V]`` -> ``[..., V]``.

    With masks ``[L, D]`` and ``[L, V]`` and a language index over x's first axes, as :func:`mask` applies them, before the keys and
    after the values.
    """
    return _finish(_scores(x, keys, bias, mask_inner, language), values, activation, mask_outer, language)


def patch_ffn_fired(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    mask_inner: Tensor | None = None,
    mask_outer: Tensor | None = None,
    language: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`patch_ffn`, and ``[K, 2]`` int64: the (row, neuron) pairs whose score is above zero."""
    scores = _scores(x, keys, bias, mask_inner, language)
    fired = (scores.reshape(-1, scores.shape[-1]) > 0).nonzero()
    return _finish(scores, values, activation, mask_outer, language), fired


def _scores(x: Tensor, keys: Tensor, bias: Tensor, mask_inner: Tensor | None, language: Tensor | None) -> Tensor:
    if mask_inner is not None and language is not None:
        x = mask(x, mask_inner, language)
    return F.linear(x, keys, bias)


def _finish(
    scores: Tensor, values: Tensor, activation: str, mask_outer: Tensor | None, language: Tensor | None
) -> Tensor:
    out = activate(scores, activation) @ values
    return out if mask_outer is None or language is None else mask(out, mask_outer, language)


def patch_ffn_backward(
    grad: Tensor, x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`patch_ffn` for x, keys, bias and values, each None where ``needed`` says so.

    ``grad`` is ``[..., V]``; the others as in :func:`patch_ffn`. The scores are computed again, not stored.
    """
    rows = x.reshape(-1, keys.shape[1])
    grad = grad.reshape(-1, values.shape[1])
    z = F.linear(rows, keys, bias)
    grad_values = activate(z, activation).t() @ grad if needed[3] else None
    if not any(needed[:3]):
        return None, None, None, grad_values
    grad_z = activate_backward(grad @ values.t(), z, activation)
    grad_x = (grad_z @ keys).reshape(x.shape) if needed[0] else None
    grad_keys = grad_z.t() @ rows if needed[1] else None
    grad_bias = grad_z.sum(0) if needed[2] else None
    return grad_x, grad_keys, grad_bias, grad_values


def lowrank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``(x downᵀ) upᵀ``: x ``[..., D]``, down ``[R, D]``, up ``[V, R]`` -> ``[..., V]``."""
    return F.linear(F.linear(x, down), up)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weightᵀ + bias``: x ``[..., D]``, weight ``[V, D]``, bias ``[V]`` or None -> ``[..., V]``."""
    return F.linear(x, weight, bias)


def mask(x: Tensor, masks: Tensor, language_index: Tensor) -> Tensor:
    """``x ⊙ masks[language]``: x ``[..., D]``, masks ``[L, D]``, language_index (integers) over x's first axes.

    An index of shape ``[B]`` with x ``[B, T, D]`` gives all T rows of an item its language's mask.
    """
    return x * spread_mask(masks, language_index, x)


def spread_mask(masks: Tensor, language_index: Tensor, x: Tensor) -> Tensor:
    """``masks[language]`` with as many axes as x."""
    chosen = masks[language_index]
    while chosen.ndim < x.ndim:
        chosen = chosen.unsqueeze(-2)
    return chosen


def sum_by_language(products: Tensor, language_index: Tensor, masks: Tensor) -> Tensor:
    """products ``[..., D]`` summed over the rows of each language -> as masks ``[L, D]``: the gradient of :func:`mask`'s masks."""
    index = language_index.reshape(*language_index.shape, *[1] * (products.ndim - 1 - language_index.ndim))
    index = index.expand(products.shape[:-1]).reshape(-1)
    return torch.zeros_like(masks).index_add(0, index, products.reshape(-1, products.shape[-1]))
