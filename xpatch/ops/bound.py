"""`patch_ffn` of neurons that stay: what does not change between calls is checked and looked up once.

A served model calls a site's neurons thousands of times, from cold caches: then the way to the kernel takes as long as a thousand
neurons do in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xpatch.errors import BackendError
from xpatch.ops import native, reference
from xpatch.ops.registry.library import dense_rows, in_torch_func
from xpatch.ops.registry.patch_ffn import CODES, _check, _screens, fired_pairs, patch_ffn, patch_ffn_fired

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state


class BoundPatchFfn:
    """Arguments, results and errors as for :func:`xpatch.ops.patch_ffn` without masks. The tensors must not be written to.

    >>> neurons = BoundPatchFfn(keys, bias, values, "relu", pack_keys(keys, bias, "relu"))
    >>> neurons(x)  # the bits of patch_ffn(x, keys, bias, values, "relu", packed)
    """

    def __init__(
        self, keys: Tensor, bias: Tensor, values: Tensor, activation: str, packed: Tensor | None = None
    ) -> None:
        activation = _check(keys, keys, bias, values, activation, packed)  # keys stand for inputs
        self._neurons = (keys, bias, values, activation, packed)
        self._dtype, self._width, self._square = keys.dtype, keys.shape[1], keys.shape[1] == values.shape[1]
        self._kernel = None
        trained = keys.requires_grad or bias.requires_grad or values.requires_grad
        if packed is not None and not trained and keys.shape[1] and _screens(keys, packed):
            keys, bias, values, packed = dense_rows(keys), bias.contiguous(), dense_rows(values), packed.contiguous()
            self._held = (keys, bias, values, packed)  # what the kernel points to
            self._kernel = native.load().PatchFfnCall(
                *(keys.data_ptr(), bias.data_ptr(), values.data_ptr()),
                *(keys.shape[1], keys.shape[0], values.shape[1], keys.stride(0), values.stride(0)),
                *(native.DTYPE_CODES[keys.dtype], CODES[activation], packed.data_ptr(), packed.shape[0]),
            )

    def __call__(self, x: Tensor) -> Tensor:
        """x ``[..., D]`` -> ``[..., V]``."""
        found = self._run(x, False)
        if found is None:
            return patch_ffn(x, *self._neurons)
        out, fired = found
        return reference.patch_ffn(x, *self._neurons[:4]) if fired is None else out

    def fired(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and ``[K, 2]`` int64: which neurons fired (:func:`xpatch.ops.patch_ffn_fired`)."""
        found = self._run(x, True)
        if found is None:
            return patch_ffn_fired(x, *self._neurons)
        out, fired = found
        return reference.patch_ffn_fired(x, *self._neurons[:4]) if fired is None else (out, fired_pairs(fired))

    def _run(self, x: Tensor, want_fired: bool) -> tuple[Tensor, bytes | None] | None:
        """The output and what fired, None there where too many neurons survive; None where x needs a look by torch's dispatcher."""
        # In one place and by the cheapest means: each call here takes as long, from cold caches, as scoring forty neurons.
        kernel = self._kernel
        if (
            torch.compiler.is_compiling()  # first: a compiler follows no further
            or kernel is None
            or type(x) is not Tensor
            or x.dtype is not self._dtype
            or not x.is_contiguous()
            or not x.dim()
            or x.size(-1) != self._width
            or (x.requires_grad and torch.is_grad_enabled())
            or _dispatch_modes()
            or _function_modes()
            or in_torch_func()
            or _tracing() is not None
            or not x.is_cpu
        ):
            return None
        out = torch.empty_like(x) if self._square else x.new_empty((*x.shape[:-1], self._neurons[2].shape[1]))
        try:
            rows = x.numel() // self._width
            return out, kernel.run(x.data_ptr(), rows, out.data_ptr(), want_fired, torch.get_num_threads())
        except native.load().NativeError as error:
            raise BackendError(f"the native kernel failed: {error}") from error
