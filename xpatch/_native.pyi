# Types of the compiled module (csrc/bindings/module.cpp). Pointers and streams are plain integers;
# `fired` is 0 where it is not wanted.
from typing import Any

__version__: str

class NativeError(ValueError): ...

def info() -> dict[str, Any]: ...
def patch_ffn_cpu(
    x: int,
    keys: int,
    bias: int,
    values: int,
    out: int,
    fired: int,
    M: int,
    D: int,
    N: int,
    V: int,
    x_stride: int,
    keys_stride: int,
    values_stride: int,
    dtype: int,
    activation: int,
    threads: int,
    /,
) -> None: ...
def patch_ffn_cuda(
    x: int,
    keys: int,
    bias: int,
    values: int,
    out: int,
    mask_inner: int,
    mask_outer: int,
    language: int,
    M: int,
    D: int,
    N: int,
    V: int,
    L: int,
    x_stride: int,
    keys_stride: int,
    values_stride: int,
    dtype: int,
    activation: int,
    y: int,
    y_stride: int,
    y_dtype: int,
    epoch: int,
    live: int,
    workspace: int,
    workspace_bytes: int,
    stream: int,
    /,
) -> None: ...
def patch_ffn_cuda_workspace(M: int, D: int, N: int, V: int, dtype: int, mask_inner: bool, /) -> int: ...
