"""`patch_ffn` of neurons that stay: what does not change between calls is checked and looked up once.

A served model calls a site's neurons thousands of times, from cold caches: then the way to the kernel takes as long as a thousand
neurons do in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xpatch.errors import BackendError
from xpatch.ops import native, reference
from xpatch.ops.registry.library import dense_rows
from xpatch.ops.registry.patch_ffn import (
    CODES,
    _check,
    _needs_no_dispatch,
    _screens,
    fired_pairs,
    patch_ffn,
    patch_ffn_fired,
)


class BoundPatchFfn:
    """Arguments, results and errors as for :func:`xpatch.ops.patch_ffn` without masks. The tensors must not be written to.

    >>> neurons = BoundPatchFfn(keys, bias, values, "relu", pack_keys(keys, bias, "relu"))
    >>> neurons(x)  # the bits of patch_ffn(x, keys, bias, values, "relu", packed)
    """

    def __init__(
        self, keys: Tensor, bias: Tensor, values: Tensor, activation: str, packed: Tensor | None = None
    ) -> None:
        activation = _check(keys[:0], keys, bias, values, activation, packed)
        self._neurons = (keys, bias, values, activation, packed)
        self._dtype, self._width, self._square = keys.dtype, keys.shape[1], keys.shape[1] == values.shape[1]
        self._kernel = None
        trained = keys.requires_grad or bias.requires_grad or values.requires_grad
        if packed is not None and keys.is_cpu and not trained and keys.shape[1] and _screens(keys, packed):
            keys, bias, values, packed = dense_rows(keys), bias.contiguous(), dense_rows(values), packed.contiguous()
            self._held = (keys, bias, values, packed)  # what the kernel points to
            self._kernel = native.load().PatchFfnCall(
                *(keys.data_ptr(), bias.data_ptr(), values.data_ptr()),
                *(keys.shape[1], keys.shape[0], values.shape[1], keys.stride(0), values.stride(0)),
                *(native.DTYPE_CODES[keys.dtype], CODES[activation], packed.data_ptr(), packed.shape[0]),
            )

    def __call__(self, x: Tensor) -> Tensor:
        """x ``[..., D]`` -> ``[..., V]``."""
        if not self._takes(x):
            return patch_ffn(x, *self._neurons)
        out, fired = self._run(x, False)
        return reference.patch_ffn(x, *self._neurons[:4]) if fired is None else out

    def fired(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and ``[K, 2]`` int64: which neurons fired (:func:`xpatch.ops.patch_ffn_fired`)."""
        if not self._takes(x):
            return patch_ffn_fired(x, *self._neurons)
        out, fired = self._run(x, True)
        return reference.patch_ffn_fired(x, *self._neurons[:4]) if fired is None else (out, fired_pairs(fired))

    def _takes(self, x: Tensor) -> bool:
        """Whether x can go to the kernel without a look by torch's dispatcher."""
        return (
            self._kernel is not None
            and type(x) is Tensor
            and x.dtype is self._dtype
            and x.is_contiguous()
            and x.ndim > 0
            and x.shape[-1] == self._width
            and _needs_no_dispatch(x)
        )

    def _run(self, x: Tensor, want_fired: bool) -> tuple[Tensor, bytes | None]:
        values, kernel = self._neurons[2], self._kernel
        out = torch.empty_like(x) if self._square else x.new_empty((*x.shape[:-1], values.shape[1]))
        assert kernel is not None  # what _takes has seen
        try:
            rows = x.numel() // self._width
            return out, kernel.run(x.data_ptr(), rows, out.data_ptr(), want_fired, torch.get_num_threads())
        except native.load().NativeError as error:
            raise BackendError(f"the native kernel failed: {error}") from error
