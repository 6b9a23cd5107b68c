"""``xpatch::patch_ffn_capacity``: `patch_ffn` on buffers of a fixed size whose used part is read where the kernel runs.

A captured CUDA graph replays kernels on fixed addresses. Which half of the buffers is current and how many neurons it holds are
therefore read from memory by the operator itself, at every replay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xpatch.errors import MismatchError
from xpatch.ops import native, reference
from xpatch.ops.registry.library import define, implement, in_torch_func, library, refuse
from xpatch.ops.registry.on_cuda import patch_ffn_on_cuda

define(
    "patch_ffn_capacity(Tensor x, Tensor keys, Tensor bias, Tensor values, Tensor live, Tensor epoch, str activation, "
    "Tensor? y=None) -> Tensor"
)


def patch_ffn_capacity(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    live: Tensor,
    epoch: Tensor,
    activation: str,
    y: Tensor | None = None,
) -> Tensor:
    """:func:`~xpatch.ops.patch_ffn` with the neurons of one half of `keys`, `bias` and `values` that are in use.

    Args:
        x: ``[..., D]`` inputs.
        keys: ``[2, C, D]``, contiguous; ``bias`` ``[2, C]`` and ``values`` ``[2, C, V]`` likewise. All share x's floating dtype.
        live: ``[2]`` int64, how many neurons of each half are in use: the first ones. Counts outside [0, C] are taken as 0 or C.
        epoch: ``[1]`` int64, which half is read: 0 the first, anything else the second.
        activation: as for `patch_ffn`.
        y: ``[..., V]``, any floating dtype, or None. With it the result is ``y + patch``, formed in the dtype of `keys` (or of y where
            that is wider) and rounded once to y's.

    Neurons that are not in use count for nothing, whatever they hold. Native kernels and the CPU path never read them. On CUDA
    tensors the framework's matmuls run on a copy of the half, unless ``XPATCH_BACKEND=native``. Differentiable in x and y.

    Returns:
        ``[..., V]``, x's dtype or y's, contiguous.

    Raises:
        MismatchError: shapes, dtypes, devices or layouts do not fit together, the activation is unknown, or a gradient was asked
            for `keys`, `bias` or `values`, which are buffers.
        BackendError: the native build was asked for (``XPATCH_BACKEND=native``) and is missing or failed.
    """
    arguments = (x, keys, bias, values, live, epoch, activation, y)
    if in_torch_func():
        return _by_selection(x, keys, bias, values, live, epoch, _check(*arguments), y)
    return torch.ops.xpatch.patch_ffn_capacity(*arguments)


def _check(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    live: Tensor,
    epoch: Tensor,
    activation: str,
    y: Tensor | None = None,
) -> str:
    """The canonical activation, after checking that everything fits."""

    def misfit(expected: str) -> Exception:
        buffers = {"keys": keys, "bias": bias, "values": values, "live": live, "epoch": epoch}
        return refuse("patch_ffn_capacity", expected, x=x, **buffers, y=y)

    if x.ndim < 1 or keys.ndim != 3 or bias.ndim != 2 or values.ndim != 3 or keys.shape[0] != 2:
        raise misfit("x [..., D], keys [2, C, D], bias [2, C], values [2, C, V]")
    if keys.shape[2] != x.shape[-1]:
        raise misfit("the width of x and keys to be equal (D)")
    if bias.shape != keys.shape[:2] or values.shape[:2] != keys.shape[:2]:
        raise misfit("keys, bias and values to hold the same number of neurons (C)")
    if live.shape != (2,) or epoch.shape != (1,) or not live.dtype == epoch.dtype == torch.int64:
        raise misfit("live [2] and epoch [1], both int64")
    if not x.dtype.is_floating_point or not (x.dtype == keys.dtype == bias.dtype == values.dtype):
        raise misfit("one floating dtype for x, keys, bias and values")
    if y is not None and (y.shape != (*x.shape[:-1], values.shape[2]) or not y.dtype.is_floating_point):
        raise misfit("y [..., V], floating, with the leading axes of x")
    if any(t.device != x.device for t in (keys, bias, values, live, epoch, y) if t is not None):
        raise misfit("one device for all")
    if not (keys.is_contiguous() and bias.is_contiguous() and values.is_contiguous() and live.is_contiguous()):
        raise misfit("contiguous buffers, which no call copies")
    return reference.canonical_activation(activation)


def _half(keys: Tensor, bias: Tensor, values: Tensor, live: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of the current half, ``[C, D]``, ``[C]`` and ``[C, V]``, made without a look at any number.

    What is not in use is zero there, so that not even NaN comes through.
    """
    current = (epoch != 0).long()
    used = (torch.arange(keys.shape[1], device=keys.device) < live.index_select(0, current)).unsqueeze(1)
    key, value = (torch.where(used, t.index_select(0, current)[0], 0) for t in (keys, values))
    return key, torch.where(used[:, 0], bias.index_select(0, current)[0], 0), value


def _plus(y: Tensor | None, delta: Tensor) -> Tensor:
    return delta if y is None else (y + delta).to(y.dtype)


def _by_selection(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    live: Tensor,
    epoch: Tensor,
    activation: str,
    y: Tensor | None,
) -> Tensor:
    """The reference, and what runs where the host may not wait for the device. Unused neurons have zero values."""
    keys, bias, values = _half(keys, bias, values, live, epoch)
    return _plus(y, reference.patch_ffn(x, keys, bias, values, activation))


def _run(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    live: Tensor,
    epoch: Tensor,
    activation: str,
    y: Tensor | None = None,
) -> Tensor:
    activation = _check(x, keys, bias, values, live, epoch, activation, y)
    if x.device.type == "cpu":  # numbers can be looked at: the used part is a view
        half = int(epoch.item() != 0)
        count = min(max(int(live[half]), 0), keys.shape[1])
        delta = torch.ops.xpatch.patch_ffn(x, keys[half, :count], bias[half, :count], values[half, :count], activation)
        return _plus(y, delta)
    known = y is None or y.dtype in native.DTYPE_CODES
    if known and native.backend_for(x.device.type, x.dtype) == "native":
        return patch_ffn_on_cuda(x, keys, bias, values, activation, y=y, live=live, epoch=epoch)
    return _by_selection(x, keys, bias, values, live, epoch, activation, y)


def _fake(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    live: Tensor,
    epoch: Tensor,
    activation: str,
    y: Tensor | None = None,
) -> Tensor:
    _check(x, keys, bias, values, live, epoch, activation, y)
    return (x if y is None else y).new_empty((*x.shape[:-1], values.shape[2]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, keys, bias, values, live, epoch, ctx.activation, *_ = inputs
    if any(t.requires_grad for t in (keys, bias, values)):
        raise MismatchError(
            "patch_ffn_capacity: expected keys, bias and values without gradients, found one that requires its own; they are buffers "
            "that a writer fills between replays: train with patch_ffn"
        )
    ctx.save_for_backward(x, keys, bias, values, live, epoch)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *buffers = ctx.saved_tensors
    given = len(ctx.needs_input_grad)  # torch leaves out trailing arguments that have their default
    keys, bias, values = _half(*buffers)
    wants = (ctx.needs_input_grad[0], False, False, False)
    grad_x = reference.patch_ffn_backward(grad.to(x.dtype), x, keys, bias, values, ctx.activation, wants)[0]
    return (grad_x, *[None] * 6, grad)[:given]


implement("patch_ffn_capacity", _run, _fake)
torch.library.register_autograd("xpatch::patch_ffn_capacity", _backward, setup_context=_save, lib=library)
