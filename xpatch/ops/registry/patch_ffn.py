"""``xpatch::patch_ffn`` and ``xpatch::patch_ffn_fired``: schema, fake, kernels per device, autograd.

Both are opaque to ``torch.compile`` and ``torch.export`` and differentiable through the formulas of :mod:`xpatch.ops.reference`.
On the CPU the native kernel runs where the keys come packed; everything else is the framework's matmuls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xpatch.errors import MismatchError
from xpatch.ops import native, reference
from xpatch.ops.registry.library import call_native, define, dense_rows, implement, in_torch_func, library, refuse
from xpatch.ops.registry.on_cuda import patch_ffn_on_cuda

CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}

_ARGUMENTS = (
    "Tensor x, Tensor keys, Tensor bias, Tensor values, str activation, Tensor? packed=None, Tensor? mask_inner=None, "
    "Tensor? mask_outer=None, Tensor? language=None"
)
define(f"patch_ffn({_ARGUMENTS}) -> Tensor")
define(f"patch_ffn_fired({_ARGUMENTS}) -> (Tensor, Tensor)")

_Masks = tuple[Tensor | None, Tensor | None, Tensor | None]


def patch_ffn(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    packed: Tensor | None = None,
    mask_inner: Tensor | None = None,
    mask_outer: Tensor | None = None,
    language: Tensor | None = None,
) -> Tensor:
    """What N patch neurons add beside an FFN: ``act(x keysᵀ + bias) values``.

    Args:
        x: ``[..., D]`` inputs.
        keys: ``[N, D]``, one key per neuron.
        bias: ``[N]``.
        values: ``[N, V]``, finite; V is D again for a neuron beside a whole FFN.
        activation: ``relu``, ``gelu``, ``gelu_tanh`` (``gelu_new``), ``silu`` or ``identity``.
        packed: ``[bytes]`` uint8 from :func:`pack_keys` of the same keys, bias and activation, on the CPU. With it the native kernel
            screens the neurons in int8 and computes in fp32 only those that may not be silent.
        mask_inner, mask_outer, language: language masks ``[L, D]`` and ``[L, V]`` (either may be None) and, over x's first axes, the
            row of both that each input uses (int64): ``mask_outer[l] ⊙ (act((mask_inner[l] ⊙ x) keysᵀ + bias) values)``.

    All tensors share one floating dtype and one device; no memory layout is required (inner strides are copied). N, or the number
    of rows, may be 0. On the native CPU path the sums are fp32 for every dtype, and the result has the bits of computing every
    neuron in fp32, whatever the number of threads (``torch.get_num_threads()``). Where many neurons survive the screening the
    framework's matmuls run instead: a result then agrees to fp32 rounding.

    Returns:
        ``[..., V]``, same dtype and device, contiguous.

    Raises:
        MismatchError: shapes, dtypes or devices do not fit together, a language is not in the masks, or the activation is unknown.
        BackendError: the native build was asked for (``XPATCH_BACKEND=native``) and is missing or failed; or ``packed`` was made from
            keys of another shape.
    """
    arguments = (x, keys, bias, values, activation, packed, mask_inner, mask_outer, language)
    if _needs_no_dispatch(x, keys, bias, values, mask_inner, mask_outer):
        return _run(*arguments)
    if in_torch_func():
        return reference.patch_ffn(*arguments[:4], _check(*arguments), mask_inner, mask_outer, language)
    return torch.ops.xpatch.patch_ffn(*arguments)


def patch_ffn_fired(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    packed: Tensor | None = None,
    mask_inner: Tensor | None = None,
    mask_outer: Tensor | None = None,
    language: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`patch_ffn`, and which neurons fired: those whose score is above zero.

    The scores are computed once for both. Arguments and errors as for :func:`patch_ffn`.

    Returns:
        ``[..., V]``, bit for bit what :func:`patch_ffn` returns, and ``[K, 2]`` int64: (row, neuron) of the K pairs that fired, in
        ascending order, rows counted over all leading axes of x; without a gradient.
    """
    arguments = (x, keys, bias, values, activation, packed, mask_inner, mask_outer, language)
    if _needs_no_dispatch(x, keys, bias, values, mask_inner, mask_outer):
        return _run_fired(*arguments)
    if in_torch_func():
        return reference.patch_ffn_fired(*arguments[:4], _check(*arguments), mask_inner, mask_outer, language)
    return torch.ops.xpatch.patch_ffn_fired(*arguments)


def _needs_no_dispatch(*tensors: Tensor | None) -> bool:
    """Whether torch's dispatcher would only hand the call on: plain CPU tensors, no gradient, nothing that traces or intercepts.

    For one row and a thousand neurons the way through it takes as long as the kernel.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if in_torch_func() or torch._C._get_tracing_state() is not None:
        return False
    gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter) or not tensor.is_cpu:
            return False
        if gradients and tensor.requires_grad:
            return False
    return True


def _check(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    packed: Tensor | None = None,
    mask_inner: Tensor | None = None,
    mask_outer: Tensor | None = None,
    language: Tensor | None = None,
) -> str:
    """The canonical activation, after checking that everything fits."""

    def misfit(expected: str) -> Exception:
        masks = {"mask_inner": mask_inner, "mask_outer": mask_outer, "language": language}
        return refuse("patch_ffn", expected, x=x, keys=keys, bias=bias, values=values, packed=packed, **masks)

    # Each look at a tensor takes as long as scoring a neuron: none is taken twice.
    lead, of_keys, of_bias, of_values = x.shape, keys.shape, bias.shape, values.shape
    dtype, device = x.dtype, x.device
    if len(lead) < 1 or len(of_keys) != 2 or len(of_bias) != 1 or len(of_values) != 2:
        raise misfit("x [..., D], keys [N, D], bias [N], values [N, V]")
    if of_keys[1] != lead[-1]:
        raise misfit("the width of x and keys to be equal (D)")
    if of_bias[0] != of_keys[0] or of_values[0] != of_keys[0]:
        raise misfit("keys, bias and values to hold the same number of neurons (N)")
    if not dtype.is_floating_point or keys.dtype != dtype or bias.dtype != dtype or values.dtype != dtype:
        raise misfit("one floating dtype for all")
    if keys.device != device or bias.device != device or values.device != device:
        raise misfit("one device for all")
    if packed is not None and (
        packed.dtype != torch.uint8 or packed.ndim != 1 or packed.device.type not in ("cpu", "meta")
    ):
        raise misfit("packed to be the 1-D uint8 CPU tensor that xpatch.ops.pack_keys returns")
    if language is None and mask_inner is None and mask_outer is None:
        return reference.canonical_activation(activation)
    masks = [mask for mask in (mask_inner, mask_outer) if mask is not None]
    if any(mask.dtype != dtype for mask in masks):
        raise misfit("one floating dtype for all")
    if any(t is not None and t.device != device for t in (*masks, language)):
        raise misfit("one device for all")
    if language is None:
        raise misfit("language, an int64 tensor over x's first axes, beside masks")
    if language.dtype != torch.int64 or language.shape != lead[: language.ndim] or language.ndim >= len(lead):
        raise misfit("language to be int64 over x's first axes")
    if any(mask.ndim != 2 or mask.shape[0] != masks[0].shape[0] for mask in masks):
        raise misfit("mask_inner [L, D] and mask_outer [L, V] of the same languages")
    if mask_inner is not None and mask_inner.shape[1] != lead[-1]:
        raise misfit("mask_inner [L, D] with the width of x")
    if mask_outer is not None and mask_outer.shape[1] != of_values[1]:
        raise misfit("mask_outer [L, V] with the width of values")
    return reference.canonical_activation(activation)


def _check_languages(mask_inner: Tensor | None, mask_outer: Tensor | None, language: Tensor | None) -> None:
    """On the CPU, where the values can be seen for nothing."""
    masks = mask_outer if mask_inner is None else mask_inner
    if masks is None or language is None or language.device.type != "cpu" or not language.numel():
        return
    lowest, highest = language.aminmax()
    if lowest < 0 or highest >= masks.shape[0]:
        wrong = int(lowest if lowest < 0 else highest)
        raise MismatchError(f"patch_ffn: expected language in [0, L = {masks.shape[0]}); found {wrong}")


def _screens(x: Tensor, packed: Tensor | None) -> bool:
    """The CPU kernel needs packed keys; what has none is dense work, and that stays with the framework."""
    return packed is not None and x.device.type == "cpu" and native.backend_for("cpu", x.dtype) == "native"


def native_call(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    packed: Tensor,
    masks: _Masks = (None, None, None),
    *,
    always: bool = False,
    want_fired: bool = False,
) -> tuple[Tensor, tuple[bool, int, int, bytes, bool]]:
    """The CPU kernel on checked arguments: the output, and (too_many, pairs, survivors, fired, coarse) of csrc/ops/patch_ffn.h.

    always: do not give up where many neurons survive. `fired` holds int64 pairs.
    """
    rows, keys, values = (
        dense_rows(x if x.ndim == 2 else x.reshape(-1, x.shape[-1])),
        dense_rows(keys),
        dense_rows(values),
    )
    (count, width), neurons, columns = rows.shape, keys.shape[0], values.shape[1]
    mask_inner, mask_outer, language = masks
    languages = 0
    addresses: tuple[int, ...] = (0, 0, 0)
    if language is not None and (mask_inner is not None or mask_outer is not None):
        language = language.reshape(*language.shape, *[1] * (x.ndim - 1 - language.ndim)).expand(x.shape[:-1])
        language = language.contiguous()
        mask_inner, mask_outer = (None if t is None else t.contiguous() for t in (mask_inner, mask_outer))
        languages = next(t.shape[0] for t in (mask_inner, mask_outer) if t is not None)
        addresses = tuple(0 if t is None else t.data_ptr() for t in (mask_inner, mask_outer, language))
    bias, packed = bias.contiguous(), packed.contiguous()
    out = torch.empty((count, columns) if x.ndim == 2 else (*x.shape[:-1], columns), dtype=x.dtype)
    result = call_native(
        "patch_ffn",
        x.device,
        *(rows.data_ptr(), keys.data_ptr(), bias.data_ptr(), values.data_ptr(), out.data_ptr()),
        *addresses,
        *(count, width, neurons, columns, languages),
        *(rows.stride(0), keys.stride(0), values.stride(0)),
        *(native.DTYPE_CODES[x.dtype], CODES[activation], packed.data_ptr(), packed.shape[0], always, want_fired),
    )
    return out, result


def _run(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    packed: Tensor | None = None,
    mask_inner: Tensor | None = None,
    mask_outer: Tensor | None = None,
    language: Tensor | None = None,
) -> Tensor:
    activation = _check(x, keys, bias, values, activation, packed, mask_inner, mask_outer, language)
    _check_languages(mask_inner, mask_outer, language)
    if packed is not None and _screens(x, packed):
        out, result = native_call(x, keys, bias, values, activation, packed, (mask_inner, mask_outer, language))
        if not result[0]:
            return out
    elif x.device.type == "cuda" and native.backend_for("cuda", x.dtype) == "native":
        return patch_ffn_on_cuda(x, keys, bias, values, activation, (mask_inner, mask_outer, language))
    return reference.patch_ffn(x, keys, bias, values, activation, mask_inner, mask_outer, language)


def _run_fired(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    packed: Tensor | None = None,
    mask_inner: Tensor | None = None,
    mask_outer: Tensor | None = None,
    language: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    activation = _check(x, keys, bias, values, activation, packed, mask_inner, mask_outer, language)
    _check_languages(mask_inner, mask_outer, language)
    if packed is not None and _screens(x, packed):
        masks = (mask_inner, mask_outer, language)
        out, (too_many, _, _, fired, _) = native_call(x, keys, bias, values, activation, packed, masks, want_fired=True)
        if not too_many:
            return out, fired_pairs(fired)
    return reference.patch_ffn_fired(x, keys, bias, values, activation, mask_inner, mask_outer, language)


def fired_pairs(fired: bytes) -> Tensor:
    """``[K, 2]`` int64 of what the kernel reports."""
    pairs = torch.frombuffer(bytearray(fired), dtype=torch.int64) if fired else torch.empty(0, dtype=torch.int64)
    return pairs.view(-1, 2)


def _fake(*arguments: Any) -> Tensor:
    _check(*arguments)
    x, _, _, values, *_ = arguments
    return x.new_empty((*x.shape[:-1], values.shape[1]))


def _fake_fired(*arguments: Any) -> tuple[Tensor, Tensor]:
    out = _fake(*arguments)
    pairs = torch.library.get_ctx().new_dynamic_size()
    return out, out.new_empty((pairs, 2), dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, keys, bias, values, ctx.activation, _, mask_inner, mask_outer, language = inputs
    ctx.save_for_backward(x, keys, bias, values, mask_inner, mask_outer, language)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, keys, bias, values, mask_inner, mask_outer, language = ctx.saved_tensors
    given = len(ctx.needs_input_grad)  # torch leaves out trailing arguments that have their default
    needed = (*ctx.needs_input_grad, *[False] * 9)[:9]
    inner = None if mask_inner is None else reference.spread_mask(mask_inner, language, x)
    outer = None if mask_outer is None else reference.spread_mask(mask_outer, language, grad)
    masked = x if inner is None else x * inner
    before = grad if outer is None else grad * outer
    wants = (needed[0] or needed[6], needed[1], needed[2], needed[3])
    grad_x, *others = reference.patch_ffn_backward(before, masked, keys, bias, values, ctx.activation, wants)
    grad_inner = grad_outer = None
    if needed[6] and grad_x is not None:
        grad_inner = reference.sum_by_language(grad_x * x, language, mask_inner)
    if needed[7]:
        plain = reference.patch_ffn(masked, keys, bias, values, ctx.activation)
        grad_outer = reference.sum_by_language(grad * plain, language, mask_outer)
    if grad_x is not None and inner is not None:
        grad_x = grad_x * inner
    return (grad_x if needed[0] else None, *others, None, None, grad_inner, grad_outer, None)[:given]


for _name, _kernel, _shapes in (("patch_ffn", _run, _fake), ("patch_ffn_fired", _run_fired, _fake_fired)):
    implement(_name, _kernel, _shapes)
    torch.library.register_autograd(f"xpatch::{_name}", _backward, setup_context=_save, lib=library)
