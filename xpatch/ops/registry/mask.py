"""Registers ``xpatch::mask`` with torch: schema, fake, kernels per device, autograd.

The op is opaque to ``torch.compile`` and ``torch.export`` and differentiable through the formulas of
:mod:`xpatch.ops.reference`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xpatch.errors import MismatchError
from xpatch.ops import native, reference
from xpatch.ops.registry.library import call_native, define, dense_rows, implement, in_torch_func, library, refuse

define("mask(Tensor x, Tensor masks, Tensor language) -> Tensor")

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def mask(x: Tensor, masks: Tensor, language: Tensor) -> Tensor:
    """Every row times its language's mask: ``x ⊙ masks[language]`` (language-anisotropic editing, Xu et al. 2023).

    Args:
        x: ``[..., D]``.
        masks: ``[L, D]``, one per language.
        language: integers in ``[0, L)`` over x's first axes: with x ``[B, T, D]`` and language ``[B]`` all T rows of an item
            get its mask; without axes one language holds for all rows.

    x and masks share one floating dtype, all tensors one device; no memory layout is required. D, or the number of rows,
    may be 0. The native kernels read the masks where they are instead of a copy per row.

    Returns:
        ``[..., D]``, same dtype and device, contiguous. Where a language is out of range on another device than the CPU,
        its rows are NaN: raising would mean waiting for the device.

    Raises:
        MismatchError: shapes, dtypes or devices do not fit together, or a language on the CPU is outside ``[0, L)``.
        BackendError: the native build was asked for (``XPATCH_BACKEND=native``) and is missing or failed.
    """
    if in_torch_func():
        _check(x, masks, language)
        return reference.mask(x, *_in_range(masks, language))
    return torch.ops.xpatch.mask(x, masks, language)


def _check(x: Tensor, masks: Tensor, language: Tensor) -> None:
    def misfit(expected: str) -> Exception:
        return refuse("mask", expected, x=x, masks=masks, language=language)

    if x.ndim < 1 or masks.ndim != 2:
        raise misfit("x [..., D], masks [L, D]")
    if masks.shape[1] != x.shape[-1]:
        raise misfit("the width of x and masks to be equal (D)")
    if language.dtype not in _INTEGERS:
        raise misfit("language to hold integers")
    if language.ndim >= x.ndim or language.shape != x.shape[: language.ndim]:
        raise misfit("the axes of language to be x's first axes")
    if not x.dtype.is_floating_point or x.dtype != masks.dtype:
        raise misfit("one floating dtype for x and masks")
    if not (x.device == masks.device == language.device):
        raise misfit("one device for all")


def _check_values(language: Tensor, languages: int) -> None:
    out = (language < 0) | (language >= languages)
    if bool(out.any()):
        raise MismatchError(
            f"mask: expected language in [0, L = {languages}); found {int(language[out][0])} among {tuple(language.shape)}"
        )


def _in_range(masks: Tensor, language: Tensor) -> tuple[Tensor, Tensor]:
    """With a last row of NaN, to which every language out of range points."""
    languages = masks.shape[0]
    known = (language >= 0) & (language < languages)
    nan = torch.full_like(masks[:1], torch.nan) if languages else masks.new_full((1, masks.shape[1]), torch.nan)
    return torch.cat([masks, nan]), torch.where(known, language.long(), languages)


def _run_native(x: Tensor, masks: Tensor, language: Tensor) -> Tensor | None:
    """None: a language is out of range."""
    rows, masks = dense_rows(reference.as_rows(x)), dense_rows(masks)
    repeat = max(1, math.prod(x.shape[language.ndim : -1]))
    language = language.long().contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    done = call_native(
        "mask",
        x.device,
        *(t.data_ptr() for t in (rows, masks, language, out)),
        *(rows.shape[0], rows.shape[1], masks.shape[0], repeat),
        *(rows.stride(0), masks.stride(0)),
        native.DTYPE_CODES[x.dtype],
    )
    return out if done else None


def _run(x: Tensor, masks: Tensor, language: Tensor) -> Tensor:
    _check(x, masks, language)
    if native.backend_for(x.device.type, x.dtype) == "native":
        found = _run_native(x, masks, language)
        if found is not None:
            return found
    if x.device.type == "cpu":
        _check_values(language, masks.shape[0])
        return reference.mask(x, masks, language.long()).contiguous()
    return reference.mask(x, *_in_range(masks, language)).contiguous()


def _fake(x: Tensor, masks: Tensor, language: Tensor) -> Tensor:
    _check(x, masks, language)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, masks, language = ctx.saved_tensors
    language = language.long()
    grad_x = mask(grad, masks, language) if ctx.needs_input_grad[0] else None
    grad_masks = reference.sum_by_language(grad * x, language, masks) if ctx.needs_input_grad[1] else None
    return grad_x, grad_masks, None


implement("mask", _run, _fake)
torch.library.register_autograd("xpatch::mask", _backward, setup_context=_save, lib=library)
