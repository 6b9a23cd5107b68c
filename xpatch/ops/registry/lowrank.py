"""Registers ``xpatch::lowrank`` with torch: schema, fake, kernels per device, autograd.

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

define("lowrank(Tensor x, Tensor down, Tensor up, Tensor? offsets=None, Tensor? rows=None) -> Tensor")


def lowrank(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """What G low-rank deltas add beside a linear layer, each on the rows that name it: ``Σ_g (x down_gᵀ) up_gᵀ``.

    Args:
        x: ``[..., D]`` inputs.
        down: ``[R, D]``, the ranks of all deltas one after another.
        up: ``[V, R]``, finite. Stored as the transpose of a contiguous ``[R, V]`` it is read without a copy.
        offsets: ``[G + 1]`` int64, ascending from 0 to R: delta g owns the ranks ``offsets[g]:offsets[g + 1]``. None: one
            delta owns all. The values are checked on the CPU; on other devices wrong ones are not noticed.
        rows: ``[..., G]`` bool over x's first axes: which deltas a row gets; with x ``[B, T, D]`` and rows ``[B, G]`` all T
            rows of an item get the same. None: every row gets every delta.

    x, down and up share one floating dtype, all tensors one device; no memory layout is required. R, G, or the number of
    rows, may be 0. Without ``rows`` the framework's two matmuls run. With it the native kernel computes what was named and
    nothing else, in fp32 sums that add the deltas in ascending order, the same for any number of threads; where so much
    was named that two dense matmuls are faster, those run on the CPU, so a row's last bits may depend on what the other
    rows named. A row that names no delta is exactly 0. The grouping is that of S-LoRA (Sheng et al. 2023) and Punica
    (Chen et al. 2023).

    Returns:
        ``[..., V]``, same dtype and device.

    Raises:
        MismatchError: shapes, dtypes or devices do not fit together, or the offsets do not ascend from 0 to R.
        BackendError: the native build was asked for (``XPATCH_BACKEND=native``) and is missing or failed.
    """
    if rows is None or in_torch_func():
        _check(x, down, up, offsets, rows)
        return reference.lowrank(x, down, up, offsets, rows)
    return torch.ops.xpatch.lowrank(x, down, up, offsets, rows)


def _check(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor | None, rows: Tensor | None) -> None:
    def misfit(expected: str) -> Exception:
        return refuse("lowrank", expected, x=x, down=down, up=up, offsets=offsets, rows=rows)

    if x.ndim < 1 or down.ndim != 2 or up.ndim != 2:
        raise misfit("x [..., D], down [R, D], up [V, R]")
    if down.shape[1] != x.shape[-1]:
        raise misfit("the width of x and down to be equal (D)")
    if up.shape[1] != down.shape[0]:
        raise misfit("down and up to have the same number of ranks (R)")
    if not x.dtype.is_floating_point or not (x.dtype == down.dtype == up.dtype):
        raise misfit("one floating dtype for x, down and up")
    if offsets is not None and (offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int64):
        raise misfit("offsets [G + 1] int64")
    if offsets is not None and offsets.shape[0] == 1 and down.shape[0] != 0:
        raise misfit("offsets of at least one delta for R > 0 ranks")
    if rows is not None:
        deltas = 1 if offsets is None else offsets.shape[0] - 1
        if rows.ndim < 1 or rows.dtype != torch.bool or rows.shape[-1] != deltas:
            raise misfit(f"rows [..., G] bool with G = {deltas}")
        if rows.ndim > x.ndim or rows.shape[:-1] != x.shape[: rows.ndim - 1]:
            raise misfit("the axes of rows before the last to be x's first axes")
    if any(t is not None and t.device != x.device for t in (down, up, offsets, rows)):
        raise misfit("one device for all")


def _check_values(offsets: Tensor | None, ranks: int) -> None:
    """Of offsets on the CPU: anywhere else looking would mean waiting."""
    if offsets is None or offsets.device.type != "cpu":
        return
    if offsets[0] != 0 or offsets[-1] != ranks or bool((offsets[1:] < offsets[:-1]).any()):
        found = offsets.tolist() if len(offsets) <= 8 else f"{offsets[:4].tolist()} ... {offsets[-4:].tolist()}"
        raise MismatchError(f"lowrank: expected offsets to ascend from 0 to R = {ranks}; found {found}")


def _run_native(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor | None, rows: Tensor) -> Tensor | None:
    """None: two dense matmuls are faster, or the offsets are wrong."""
    ranks = down.shape[0]
    offsets = torch.tensor([0, ranks], device=x.device) if offsets is None else offsets.contiguous()
    flat, down, across = dense_rows(reference.as_rows(x)), dense_rows(down), dense_rows(up.t())
    rows = rows.contiguous()
    out = x.new_empty((*x.shape[:-1], up.shape[0]))
    done = call_native(
        "lowrank",
        x.device,
        *(t.data_ptr() for t in (flat, down, across, offsets, rows, out)),
        *(flat.shape[0], flat.shape[1], ranks, up.shape[0], rows.shape[-1]),
        max(1, math.prod(x.shape[rows.ndim - 1 : -1])),
        *(flat.stride(0), down.stride(0), across.stride(0)),
        native.DTYPE_CODES[x.dtype],
    )
    return out if done else None


def _run(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    _check(x, down, up, offsets, rows)
    if rows is not None and native.backend_for(x.device.type, x.dtype) == "native":
        found = _run_native(x, down, up, offsets, rows)
        if found is not None:
            return found
    _check_values(offsets, down.shape[0])
    return reference.lowrank(x, down, up, offsets, rows)


def _fake(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    _check(x, down, up, offsets, rows)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, offsets, rows = ctx.saved_tensors
    needed = tuple(ctx.needs_input_grad[:3])
    return (*reference.lowrank_backward(grad, x, down, up, offsets, rows, needed), None, None)


implement("lowrank", _run, _fake)
torch.library.register_autograd("xpatch::lowrank", _backward, setup_context=_save, lib=library)
