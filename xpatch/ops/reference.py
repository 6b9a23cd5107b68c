"""Pure-torch maths of every patch form: the oracle in tests, and the implementation where no native kernel fits.

Axes: ``D`` input width, ``V`` output width, ``N`` neurons, ``R`` rank, ``L`` languages; ``...`` any leading axes.
"""

from __future__ import annotations

import math
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
    fired = (as_rows(scores) > 0).nonzero().contiguous()
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


def lowrank(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """``(x downᵀ) upᵀ``: x ``[..., D]``, down ``[R, D]``, up ``[V, R]`` -> ``[..., V]``.

    With rows ``[..., G]`` bool over x's first axes only the ranks of the deltas that a row names are added: delta g owns
    ``offsets[g]:offsets[g + 1]``, offsets int64 ``[G + 1]``; without offsets one delta owns all ranks.
    """
    h = F.linear(x, down)
    if rows is not None:
        h = torch.where(named_ranks(rows, offsets, down.shape[0], x.ndim), h, 0)
    return F.linear(h, up)


def lowrank_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    offsets: Tensor | None,
    rows: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`lowrank` for x, down and up, each None where ``needed`` says so; ``grad`` is ``[..., V]``."""
    named = None if rows is None else named_ranks(rows, offsets, down.shape[0], x.ndim)
    grad_x = grad_down = grad_up = None
    if needed[0] or needed[1]:
        grad_h = grad @ up if named is None else torch.where(named, grad @ up, 0)
        grad_x = grad_h @ down if needed[0] else None
        grad_down = as_rows(grad_h).t() @ as_rows(x) if needed[1] else None
    if needed[2]:
        h = F.linear(x, down) if named is None else torch.where(named, F.linear(x, down), 0)
        grad_up = as_rows(grad).t() @ as_rows(h)
    return grad_x, grad_down, grad_up


def named_ranks(rows: Tensor, offsets: Tensor | None, ranks: int, axes: int) -> Tensor:
    """rows ``[..., G]`` bool -> ``[..., 1, ..., R]`` with `axes` axes (``[..., 1]`` without offsets): the ranks each row gets."""
    if offsets is not None:
        delta = torch.searchsorted(offsets.contiguous(), torch.arange(ranks, device=offsets.device), right=True) - 1
        rows = rows.index_select(-1, delta.clamp(0, max(rows.shape[-1] - 1, 0)))
    while rows.ndim < axes:
        rows = rows.unsqueeze(-2)
    return rows


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weightᵀ + bias``: x ``[..., D]``, weight ``[V, D]``, bias ``[V]`` or None -> ``[..., V]``."""
    return F.linear(x, weight, bias)


def mask(x: Tensor, masks: Tensor, language: Tensor) -> Tensor:
    """``x ⊙ masks[language]``: x ``[..., D]``, masks ``[L, D]``, language (integers) over x's first axes.

    A language of shape ``[B]`` with x ``[B, T, D]`` gives all T rows of an item its language's mask.
    """
    return x * spread_mask(masks, language, x)


def spread_mask(masks: Tensor, language: Tensor, x: Tensor) -> Tensor:
    """``masks[language]`` with as many axes as x."""
    chosen = masks.index_select(0, language.reshape(-1)).reshape(*language.shape, masks.shape[1])
    while chosen.ndim < x.ndim:
        chosen = chosen.unsqueeze(-2)
    return chosen


def sum_by_language(products: Tensor, language: Tensor, masks: Tensor) -> Tensor:
    """products ``[..., D]`` summed over the rows of each language -> as masks ``[L, D]``: the gradient of :func:`mask`'s masks."""
    index = language.reshape([*language.shape, *[1] * (products.ndim - 1 - language.ndim)])
    index = index.expand(products.shape[:-1]).reshape(-1)
    return torch.zeros_like(masks).index_add(0, index, as_rows(products))


def ball(x: Tensor, keys: Tensor, radii: Tensor) -> Tensor:
    """Whether the nearest key (Euclidean) is within its own radius: x ``[..., D]``, keys ``[K, D]``, radii ``[K]`` -> ``[...]``.

    Of several nearest keys the first counts; always False without keys and for a row with NaN.
    """
    if keys.shape[0] == 0:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    if x.dtype.itemsize < 4:
        x, keys, radii = x.float(), keys.float(), radii.float()
    # The usual matmul form of the distance cancels badly where it matters, near a key.
    distance, nearest = torch.cdist(as_rows(x), keys, compute_mode="donot_use_mm_for_euclid_dist").min(dim=-1)
    return (distance <= radii[nearest]).reshape(x.shape[:-1])


def as_rows(x: Tensor) -> Tensor:
    """x ``[..., D]`` -> ``[M, D]``, also where M or D is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
