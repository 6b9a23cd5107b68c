"""What the operators share: the library they are registered in, the errors they raise, and how tensors reach native code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xpatch.errors import BackendError, MismatchError
from xpatch.ops import native

library = torch.library.Library("xpatch", "FRAGMENT")

#: Whether `torch.func.grad` and its like are at work: they see through formulas, not through operators.
in_torch_func = torch._C._are_functorch_transforms_active


def define(schema: str) -> None:
    """Add an operator that `torch.compile` and `torch.export` may keep whole: ``name(arguments) -> result``."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the kernel of every device and the fake of an operator.

    CPU and CUDA by name (they may be native); every other device through the default kernel, which sees the same function.
    """
    for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"xpatch::{name}", fake, lib=library)


def refuse(op: str, expected: str, **tensors: Tensor | None) -> MismatchError:
    """The error for tensors that do not fit together: names each with its shape, dtype and device."""
    found = ", ".join(f"{name} {tuple(t.shape)} {t.dtype} {t.device}" for name, t in tensors.items() if t is not None)
    return MismatchError(f"{op}: expected {expected}; found {found}")


def dense_rows(matrix: Tensor) -> Tensor:
    """``matrix [M, D]`` itself when its rows are dense and do not overlap, otherwise a contiguous copy."""
    if matrix.is_contiguous():
        return matrix
    if matrix.stride(1) != 1 or (matrix.shape[0] > 1 and matrix.stride(0) < matrix.shape[1]):
        return matrix.contiguous()
    return matrix


def call_native(name: str, device: torch.device, *arguments: Any) -> Any:
    """Run ``_native.<name>_cpu(*arguments, threads)`` or ``_native.<name>_cuda(*arguments, stream)``.

    Raises:
        BackendError: there is no native build, or the kernel failed.
    """
    module = native.load()
    try:
        if device.type == "cpu":
            return getattr(module, f"{name}_cpu")(*arguments, torch.get_num_threads())
        with torch.cuda.device(device):
            return getattr(module, f"{name}_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)
    except module.NativeError as error:
        raise BackendError(f"the native kernel failed: {error}") from error
