# Types of the compiled module (csrc/bindings/). Pointers and streams are plain integers, 0 for a tensor that is not there.
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
    packed: int,
    packed_bytes: int,
    always: bool,
    want_fired: bool,
    threads: int,
    /,
) -> tuple[bool, int, int, bytes, bool]: ...
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
    stream: int,
    /,
) -> None: ...
def can_screen(activation: int, D: int, /) -> bool: ...
def packed_bytes(N: int, D: int, rank: int, /) -> int: ...
def pack_keys_cpu(
    keys: int,
    bias: int,
    N: int,
    D: int,
    keys_stride: int,
    dtype: int,
    activation: int,
    basis: int,
    rank: int,
    packed: int,
    threads: int,
    /,
) -> None: ...
def int8_peak(threads: int, /) -> float: ...
