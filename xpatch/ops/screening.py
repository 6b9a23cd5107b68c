"""Keys packed for the native kernel's screening, and what the screening finds."""

from __future__ import annotations

import torch
from torch import Tensor

from xpatch.errors import MismatchError
from xpatch.ops import native, reference
from xpatch.ops.registry.library import call_native, dense_rows, refuse
from xpatch.ops.registry.patch_ffn import CODES, _check, native_call

#: From here on it pays to look at a part of the coordinates first: a third of them, those along the keys' leading directions.
COARSE_FROM_NEURONS, COARSE_FROM_WIDTH, COARSE_SHARE = 4096, 64, 3
#: A quarter of them where keys come from memory rather than a cache, and the directions of the rows are known as well.
QUARTER_FROM_BYTES = 1 << 27
SAMPLED_KEYS, RANK_AT_MOST = 2048, 1024


def pack_keys(keys: Tensor, bias: Tensor, activation: str, rows: Tensor | None = None) -> Tensor | None:
    """The keys as :func:`xpatch.ops.patch_ffn` screens them: int8, with what bounds their rounding (csrc/screen/PROOF.md).

    Args:
        keys: ``[N, D]``, fp32, fp16 or bf16.
        bias: ``[N]``, same dtype and device.
        activation: as for :func:`xpatch.ops.patch_ffn`; the cut-off is part of what is packed.
        rows: ``[M, D]``, any floating dtype: typical inputs, a few hundred or more; those that are not finite do not count. With thousands of neurons they decide which
            coordinates are looked at first, which rules out more neurons for less work. Results do not depend on them.

    Returns:
        ``[bytes]`` uint8, about N·D bytes and with thousands of keys a third or a quarter more, on the CPU; it is meant for this
        process and these tensors. None where screening cannot help: no native build, another device or dtype, no neurons, D above 32 768, an activation without a cut-off (identity).

    Raises:
        MismatchError: keys and bias do not fit together, rows have another width, or the activation is unknown.
    """
    activation = reference.canonical_activation(activation)
    if keys.ndim != 2 or bias.ndim != 1 or bias.shape[0] != keys.shape[0]:
        raise refuse("pack_keys", "keys [N, D] and bias [N]", keys=keys, bias=bias)
    if keys.dtype != bias.dtype or keys.device != bias.device:
        raise refuse("pack_keys", "one dtype and one device", keys=keys, bias=bias)
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != keys.shape[1] or not rows.dtype.is_floating_point):
        raise refuse("pack_keys", "rows [M, D] of the keys' width (D) and a floating dtype", keys=keys, rows=rows)
    count, width = keys.shape
    if keys.device.type != "cpu" or not count or native.backend_for("cpu", keys.dtype) != "native":
        return None
    module = native.load()
    if not module.can_screen(CODES[activation], width):
        return None
    with torch.inference_mode(False), torch.no_grad():
        keys, bias = dense_rows(keys.detach()), bias.detach().contiguous()
        large = count >= COARSE_FROM_NEURONS and width >= COARSE_FROM_WIDTH
        basis = _leading_directions(keys, rows) if large else None
        rank, where = (0, 0) if basis is None else (basis.shape[0], basis.data_ptr())
        packed = torch.empty(module.packed_bytes(count, width, rank), dtype=torch.uint8)
        call_native(
            "pack_keys",
            keys.device,
            *(keys.data_ptr(), bias.data_ptr(), count, width, keys.stride(0)),
            *(native.DTYPE_CODES[keys.dtype], CODES[activation], where, rank, packed.data_ptr()),
        )
    return packed


def pack_balls(keys: Tensor, radii: Tensor) -> Tensor | None:
    """The balls as :func:`xpatch.ops.ball` screens them: int8 keys, with what bounds their rounding (csrc/screen/pack.cpp).

    Args:
        keys: ``[K, D]``, fp32, fp16 or bf16.
        radii: ``[K]``, same dtype and device.

    Returns:
        ``[bytes]`` uint8, about K·D bytes, on the CPU; it is meant for this process and these tensors. None where screening cannot
        help: no native build, another device or dtype, no keys, D of 0 or above 32 768.

    Raises:
        MismatchError: keys and radii do not fit together.
    """
    if keys.ndim != 2 or radii.ndim != 1 or radii.shape[0] != keys.shape[0]:
        raise refuse("pack_balls", "keys [K, D] and radii [K]", keys=keys, radii=radii)
    if keys.dtype != radii.dtype or keys.device != radii.device:
        raise refuse("pack_balls", "one dtype and one device", keys=keys, radii=radii)
    count, width = keys.shape
    if keys.device.type != "cpu" or not count or native.backend_for("cpu", keys.dtype) != "native":
        return None
    module = native.load()
    if not module.can_screen(CODES["relu"], width):  # the width alone decides
        return None
    with torch.inference_mode(False), torch.no_grad():
        keys, radii = dense_rows(keys.detach()), radii.detach().contiguous()
        packed = torch.empty(module.packed_bytes(count, width, 0), dtype=torch.uint8)
        call_native(
            "pack_balls",
            keys.device,
            *(keys.data_ptr(), radii.data_ptr(), count, width, keys.stride(0)),
            *(native.DTYPE_CODES[keys.dtype], packed.data_ptr()),
        )
    return packed


def _leading_directions(keys: Tensor, rows: Tensor | None = None) -> Tensor | None:
    """`[R, D]` fp32, orthonormal: about the directions along which keys `[N, D]`, and rows `[M, D]` where they are given, are longest;
    None where they are not finite.

    The screening multiplies what keys and rows have outside of these directions, so both count alike. Randomised subspace iteration
    (Halko, Martinsson and Tropp 2011, algorithm 4.4) over at most `SAMPLED_KEYS` of each. How good the directions are decides how
    much is screened away, never what comes out.
    """
    some, share = _of_one_length(keys), COARSE_SHARE
    rows = None if rows is None else rows[rows.isfinite().all(1)]
    if rows is not None and len(rows):
        some = torch.cat([some, _of_one_length(rows.detach().to(keys.device))])
        share += keys.numel() >= QUARTER_FROM_BYTES
    rank = min(keys.shape[1] // share // 16 * 16, RANK_AT_MOST)
    start = torch.randn(some.shape[1], rank, generator=torch.Generator().manual_seed(0))
    directions = some.T @ (some @ start)
    for _ in range(2):
        directions = some.T @ (some @ torch.linalg.qr(directions).Q)
    if not directions.isfinite().all():
        return None
    return torch.linalg.qr(directions).Q.T.contiguous()


def _of_one_length(vectors: Tensor) -> Tensor:
    """Some of vectors `[N, D]`, `SAMPLED_KEYS` at most, with a sum of squares of 1."""
    some = vectors[:: -(-vectors.shape[0] // SAMPLED_KEYS)].float()
    return some / torch.linalg.vector_norm(some).clamp(min=torch.finfo(torch.float32).tiny)


def screening_stats(x: Tensor, keys: Tensor, bias: Tensor, packed: Tensor, activation: str) -> dict[str, int | bool]:
    """How well the screening of `patch_ffn` does on these rows: arguments as there, on the CPU.

    Returns:
        ``pairs``: (row, neuron) pairs; ``survivors``: those whose bound reached the cut-off; ``fired``: those whose score is above
        zero; ``coarse``: whether the leading coordinates were enough; ``dense``: whether `patch_ffn` would give up and run the framework's matmuls.

    Raises:
        MismatchError: the tensors do not fit together, or are not where the native kernel can see them.
    """
    values = (
        keys  # as wide as the values of neurons beside an FFN: the width decides when a call is too small to give up
    )
    activation = _check(x, keys, bias, values, activation, packed)
    if x.device.type != "cpu" or native.backend_for("cpu", x.dtype) != "native":
        raise MismatchError(
            f"screening_stats: expected CPU tensors of a dtype the native build knows; found {x.dtype} on {x.device}"
        )
    _, plain = native_call(x, keys, bias, values, activation, packed)
    _, full = native_call(x, keys, bias, values, activation, packed, always=True, want_fired=True)
    return {"pairs": full[1], "survivors": full[2], "fired": len(full[3]) // 16, "coarse": full[4], "dense": plain[0]}
