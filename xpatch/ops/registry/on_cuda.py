"""How a call of ``patch_ffn`` reaches the CUDA kernels: layouts, workspace, addresses. The tensors were checked before."""

from __future__ import annotations

import torch
from torch import Tensor

from xpatch.ops import native, reference
from xpatch.ops.registry.library import call_native, dense_rows

_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}

Masks = tuple[Tensor | None, Tensor | None, Tensor | None]


def patch_ffn_on_cuda(
    x: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    activation: str,
    masks: Masks = (None, None, None),
    *,
    y: Tensor | None = None,
    live: Tensor | None = None,
    epoch: Tensor | None = None,
) -> Tensor:
    """``y + patch`` (or the patch alone) on the current stream, without waiting for the device: it can be captured into a graph.

    Args:
        x: ``[..., D]``; keys ``[N, D]``, bias ``[N]``, values ``[N, V]`` of one dtype that native code knows.
        activation: canonical.
        masks: mask_inner ``[L, D]``, mask_outer ``[L, V]``, language int64 over x's first axes; an index outside [0, L) gives NaN.
        y: ``[..., V]`` of any dtype that native code knows; the result then has this dtype.
        live, epoch: int64 ``[2]`` and ``[1]``; keys, bias and values are then contiguous ``[2, C, ...]``.

    The workspace is a tensor of this call, so that a graph that captures it owns its memory. Returns ``[..., V]``, contiguous.
    """
    rows = dense_rows(x.reshape(-1, x.shape[-1]))
    V = values.shape[-1]
    halves = live is not None
    if not halves:
        keys, bias, values = dense_rows(keys), bias.contiguous(), dense_rows(values)
    mask_inner, mask_outer, language = (None if mask is None else mask.contiguous() for mask in masks)
    if language is not None:  # one index a row
        axes = (*language.shape, *[1] * (x.ndim - 1 - language.ndim))
        language = language.reshape(axes).expand(x.shape[:-1]).contiguous()
    languages = next((mask.shape[0] for mask in (mask_inner, mask_outer) if mask is not None), 0)
    base = None if y is None else dense_rows(y.reshape(-1, V))
    out = (x if y is None else y).new_empty((*x.shape[:-1], V))
    dtype = native.DTYPE_CODES[x.dtype]
    sizes = (rows.shape[0], rows.shape[1], keys.shape[-2], V)
    needed = native.load().patch_ffn_cuda_workspace(*sizes, dtype, mask_inner is not None)
    workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    call_native(
        "patch_ffn",
        x.device,
        *(address(tensor) for tensor in (rows, keys, bias, values, out, mask_inner, mask_outer, language)),
        *sizes,
        languages,
        *(rows.stride(0), keys.stride(-2), values.stride(-2)),
        dtype,
        _CODES[activation],
        *(address(base), 0 if base is None else base.stride(0), native.DTYPE_CODES[out.dtype]),
        *(address(epoch), address(live)),
        *(workspace.data_ptr(), needed),
    )
    return out
