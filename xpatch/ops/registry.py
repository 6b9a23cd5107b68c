"""Registers ``xpatch::patch_ffn`` and ``xpatch::patch_ffn_fired`` with torch: schema, fake, kernels per device, autograd.

The ops are opaque to ``torch.compile`` and ``torch.export`` and differentiable through the formulas of
:mod:`xpatch.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xpatch.errors import BackendError, MismatchError
from xpatch.ops import native, reference

_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}

_library = torch.library.Library("xpatch", "FRAGMENT")
for _name, _result in (("patch_ffn", "Tensor"), ("patch_ffn_fired", "(Tensor, Tensor)")):
    _library.define(
        f"{_name}(Tensor x, Tensor keys, Tensor bias, Tensor values, str activation) -> {_result}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def patch_ffn(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> Tensor:
    """What N patch neurons add beside an FFN: ``act(x keysᵀ + bias) values``.

    Args:
        x: ``[..., D]`` inputs.
        keys: ``[N, D]``, one key per neuron.
        bias: ``[N]``.
        values: ``[N, V]``, finite; V is D again for a neuron beside a whole FFN.
        activation: ``relu``, ``gelu``, ``gelu_tanh`` (``gelu_new``), ``silu`` or ``identity``.

    All tensors share one floating dtype and one device; no memory layout is required. N, or the number of rows, may be
    0. On the native CPU path the sums are fp32 for every dtype, the result is bit-identical for any number of threads
    (``torch.get_num_threads()``), and a silent relu neuron's value row is not read.

    Returns:
        ``[..., V]``, same dtype and device, contiguous.

    Raises:
        MismatchError: shapes, dtypes or devices do not fit together, or the activation is unknown.
        BackendError: the native build was asked for (``XPATCH_BACKEND=native``) and is missing or failed.
    """
    if in_torch_func():
        return reference.patch_ffn(x, keys, bias, values, _check(x, keys, bias, values, activation))
    return torch.ops.xpatch.patch_ffn(x, keys, bias, values, activation)


def patch_ffn_fired(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """:func:`patch_ffn`, and which neurons fired: those whose score ``x keysᵀ + bias`` is above zero.

    The scores are computed once for both. Arguments and errors as for :func:`patch_ffn`.

    Returns:
        ``[..., V]``, bit for bit what :func:`patch_ffn` returns, and ``[..., N]`` bool, contiguous, without a gradient.
    """
    if in_torch_func():
        return reference.patch_ffn_fired(x, keys, bias, values, _check(x, keys, bias, values, activation))
    return torch.ops.xpatch.patch_ffn_fired(x, keys, bias, values, activation)


#: Whether `torch.func.grad` and its like are at work: they see through formulas, not through operators.
in_torch_func = torch._C._are_functorch_transforms_active


def _check(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> str:
    """The canonical activation, after checking that everything fits."""

    def refuse(expected: str) -> MismatchError:
        found = ", ".join(
            f"{name} {tuple(t.shape)} {t.dtype} {t.device}"
            for name, t in (("x", x), ("keys", keys), ("bias", bias), ("values", values))
        )
        return MismatchError(f"patch_ffn: expected {expected}; found {found}")

    if x.ndim < 1 or keys.ndim != 2 or bias.ndim != 1 or values.ndim != 2:
        raise refuse("x [..., D], keys [N, D], bias [N], values [N, V]")
    if keys.shape[1] != x.shape[-1]:
        raise refuse("the width of x and keys to be equal (D)")
    if bias.shape[0] != keys.shape[0] or values.shape[0] != keys.shape[0]:
        raise refuse("keys, bias and values to hold the same number of neurons (N)")
    if not x.dtype.is_floating_point or not (x.dtype == keys.dtype == bias.dtype == values.dtype):
        raise refuse("one floating dtype for all")
    if not (x.device == keys.device == bias.device == values.device):
        raise refuse("one device for all")
    return reference.canonical_activation(activation)


def _rows(matrix: Tensor) -> Tensor:
    """``matrix [M, D]`` itself when its rows are dense and do not overlap, otherwise a contiguous copy."""
    if matrix.stride(1) != 1 or (matrix.shape[0] > 1 and matrix.stride(0) < matrix.shape[1]):
        return matrix.contiguous()
    return matrix


def _run_native(
    x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str, fired: Tensor | None = None
) -> Tensor:
    module = native.load()
    rows, keys, values, bias = _rows(x.reshape(-1, x.shape[-1])), _rows(keys), _rows(values), bias.contiguous()
    out = x.new_empty((*x.shape[:-1], values.shape[1]))
    arguments = (
        *(t.data_ptr() for t in (rows, keys, bias, values, out)),
        0 if fired is None else fired.data_ptr(),
        *(rows.shape[0], rows.shape[1], keys.shape[0], values.shape[1]),
        *(rows.stride(0), keys.stride(0), values.stride(0)),
        native.DTYPE_CODES[x.dtype],
        _CODES[activation],
    )
    try:
        if x.device.type == "cpu":
            module.patch_ffn_cpu(*arguments, torch.get_num_threads())
        else:
            with torch.cuda.device(x.device):
                module.patch_ffn_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    except module.NativeError as error:
        raise BackendError(f"the native kernel failed: {error}") from error
    return out


def _run(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> Tensor:
    activation = _check(x, keys, bias, values, activation)
    if native.backend_for(x.device.type, x.dtype) == "native":
        return _run_native(x, keys, bias, values, activation)
    return reference.patch_ffn(x, keys, bias, values, activation)


def _run_fired(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    activation = _check(x, keys, bias, values, activation)
    if native.backend_for(x.device.type, x.dtype) == "native":
        fired = x.new_empty((*x.shape[:-1], keys.shape[0]), dtype=torch.bool)
        return _run_native(x, keys, bias, values, activation, fired), fired
    return reference.patch_ffn_fired(x, keys, bias, values, activation)


def _fake(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> Tensor:
    _check(x, keys, bias, values, activation)
    return x.new_empty((*x.shape[:-1], values.shape[1]))


def _fake_fired(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    out = _fake(x, keys, bias, values, activation)
    return out, x.new_empty((*x.shape[:-1], keys.shape[0]), dtype=torch.bool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, keys, bias, values = ctx.saved_tensors
    needed = tuple(ctx.needs_input_grad[:4])
    return (*reference.patch_ffn_backward(grad, x, keys, bias, values, ctx.activation, needed), None)


for _name, _kernel, _shapes in (("patch_ffn", _run, _fake), ("patch_ffn_fired", _run_fired, _fake_fired)):
    # CPU and CUDA by name (they may be native); every other device runs the reference through the default kernel.
    for _key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"xpatch::{_name}", _shapes, lib=_library)
    torch.library.register_autograd(f"xpatch::{_name}", _backward, setup_context=_save, lib=_library)
