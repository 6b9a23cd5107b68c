"""Registers ``xpatch::ball`` with torch: schema, fake, kernels per device. Its answer has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xpatch.ops import native, reference
from xpatch.ops.registry.library import call_native, define, dense_rows, implement, in_torch_func, library, refuse

define("ball(Tensor x, Tensor keys, Tensor radii, Tensor? packed=None) -> Tensor")


def ball(x: Tensor, keys: Tensor, radii: Tensor, packed: Tensor | None = None) -> Tensor:
    """GRACE's deferral (Hartvigsen et al. 2023, algorithm 1): whether a row's nearest key is within its own radius.

    Args:
        x: ``[..., D]``.
        keys: ``[K, D]``, finite.
        radii: ``[K]``, Euclidean distances.
        packed: ``[bytes]`` uint8 from :func:`pack_balls` of the same keys and radii, on the CPU. With it the native kernel screens
            many keys in int8; the answer is the same.

    All tensors share one floating dtype and one device; no memory layout is required. D, K, or the number of rows, may be
    0. Distances are formed from differences, never as a matmul, which cancels badly near a key; on the native CPU path in
    fp32 for every dtype. Of several nearest keys the first counts. The native kernel first looks for keys that have the row
    within their radius, giving each up as soon as its distance is above that, and looks for the nearest only where it found
    one.

    Returns:
        ``[...]`` bool, contiguous, without a gradient. False without keys and for a row with NaN.

    Raises:
        MismatchError: shapes, dtypes or devices do not fit together.
        BackendError: the native build was asked for (``XPATCH_BACKEND=native``) and is missing or failed; or ``packed`` was made from
            keys of another shape.
    """
    if in_torch_func():
        _check(x, keys, radii, packed)
        return reference.ball(x, keys, radii)
    return torch.ops.xpatch.ball(x, keys, radii, packed)


def _check(x: Tensor, keys: Tensor, radii: Tensor, packed: Tensor | None = None) -> None:
    def misfit(expected: str) -> Exception:
        return refuse("ball", expected, x=x, keys=keys, radii=radii, packed=packed)

    if x.ndim < 1 or keys.ndim != 2 or radii.ndim != 1:
        raise misfit("x [..., D], keys [K, D], radii [K]")
    if keys.shape[1] != x.shape[-1]:
        raise misfit("the width of x and keys to be equal (D)")
    if radii.shape[0] != keys.shape[0]:
        raise misfit("keys and radii to hold the same number of keys (K)")
    if not x.dtype.is_floating_point or not (x.dtype == keys.dtype == radii.dtype):
        raise misfit("one floating dtype for all")
    if not (x.device == keys.device == radii.device):
        raise misfit("one device for all")
    if packed is not None and (
        packed.dtype != torch.uint8 or packed.ndim != 1 or packed.device.type not in ("cpu", "meta")
    ):
        raise misfit("packed to be the 1-D uint8 CPU tensor that xpatch.ops.pack_balls returns")


def native_ball(
    x: Tensor, keys: Tensor, radii: Tensor, packed: Tensor | None = None, *, always_screen: bool = False
) -> Tensor:
    """The native kernel on checked arguments. always_screen: with `packed`, screen also where it does not pay."""
    rows, keys, radii = dense_rows(reference.as_rows(x)), dense_rows(keys), radii.contiguous()
    out = torch.empty(x.shape[:-1], dtype=torch.bool, device=x.device)
    screening: tuple[int, ...] = ()
    if x.device.type == "cpu":
        packed = None if packed is None else packed.contiguous()
        screening = (0, 0, False) if packed is None else (packed.data_ptr(), packed.shape[0], always_screen)
    call_native(
        "ball",
        x.device,
        *(t.data_ptr() for t in (rows, keys, radii, out)),
        *(rows.shape[0], rows.shape[1], keys.shape[0]),
        *(rows.stride(0), keys.stride(0)),
        native.DTYPE_CODES[x.dtype],
        *screening,
    )
    return out


def _run(x: Tensor, keys: Tensor, radii: Tensor, packed: Tensor | None = None) -> Tensor:
    _check(x, keys, radii, packed)
    if native.backend_for(x.device.type, x.dtype) == "native":
        return native_ball(x, keys, radii, packed)
    return reference.ball(x, keys, radii)


def _fake(x: Tensor, keys: Tensor, radii: Tensor, packed: Tensor | None = None) -> Tensor:
    _check(x, keys, radii, packed)
    return torch.empty(x.shape[:-1], dtype=torch.bool, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
    return (None,) * len(ctx.needs_input_grad)


implement("ball", _run, _fake)
torch.library.register_autograd("xpatch::ball", _backward, setup_context=_save, lib=library)
