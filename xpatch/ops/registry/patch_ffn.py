"""Registers ``xpatch::patch_ffn`` and ``xpatch::patch_ffn_fired`` with torch: schema, fake, kernels per device, autograd.

The ops are opaque to ``torch.compile`` and ``torch.export`` and differentiable through the formulas of
:mod:`xpatch.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xpatch.ops import native, reference
from xpatch.ops.registry.library import call_native, define, dense_rows, implement, in_torch_func, library, refuse
from xpatch.ops.registry.on_cuda import patch_ffn_on_cuda

_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}

for _name, _result in (("patch_ffn", "Tensor"), ("patch_ffn_fired", "(Tensor, Tensor)")):
    define(f"{_name}(Tensor x, Tensor keys, Tensor bias, Tensor values, str activation) -> {_result}")


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


def _check(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> str:
    """The canonical activation, after checking that everything fits."""

    def misfit(expected: str) -> Exception:
        return refuse("patch_ffn", expected, x=x, keys=keys, bias=bias, values=values)

    if x.ndim < 1 or keys.ndim != 2 or bias.ndim != 1 or values.ndim != 2:
        raise misfit("x [..., D], keys [N, D], bias [N], values [N, V]")
    if keys.shape[1] != x.shape[-1]:
        raise misfit("the width of x and keys to be equal (D)")
    if bias.shape[0] != keys.shape[0] or values.shape[0] != keys.shape[0]:
        raise misfit("keys, bias and values to hold the same number of neurons (N)")
    if not x.dtype.is_floating_point or not (x.dtype == keys.dtype == bias.dtype == values.dtype):
        raise misfit("one floating dtype for all")
    if not (x.device == keys.device == bias.device == values.device):
        raise misfit("one device for all")
    return reference.canonical_activation(activation)


def _run_native(
    x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str, fired: Tensor | None = None
) -> Tensor:
    rows, keys, values = dense_rows(x.reshape(-1, x.shape[-1])), dense_rows(keys), dense_rows(values)
    bias = bias.contiguous()
    out = x.new_empty((*x.shape[:-1], values.shape[1]))
    call_native(
        "patch_ffn",
        x.device,
        *(t.data_ptr() for t in (rows, keys, bias, values, out)),
        0 if fired is None else fired.data_ptr(),
        *(rows.shape[0], rows.shape[1], keys.shape[0], values.shape[1]),
        *(rows.stride(0), keys.stride(0), values.stride(0)),
        native.DTYPE_CODES[x.dtype],
        _CODES[activation],
    )
    return out


def _run(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> Tensor:
    activation = _check(x, keys, bias, values, activation)
    if native.backend_for(x.device.type, x.dtype) == "native":
        run = patch_ffn_on_cuda if x.device.type == "cuda" else _run_native
        return run(x, keys, bias, values, activation)
    return reference.patch_ffn(x, keys, bias, values, activation)


def _run_fired(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    activation = _check(x, keys, bias, values, activation)
    if x.device.type == "cpu" and native.backend_for(x.device.type, x.dtype) == "native":
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
    implement(_name, _kernel, _shapes)
    torch.library.register_autograd(f"xpatch::{_name}", _backward, setup_context=_save, lib=library)
