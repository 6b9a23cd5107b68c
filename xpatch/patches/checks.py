"""What every patch value is checked for when it is made, and how its tensors and mappings are frozen.

A failed check raises `FormatError`: what, where, expected, found, next step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from xpatch.errors import FormatError


def frozen_tensor(value: Any, where: str, axes: tuple[str, ...], sizes: dict[str, int]) -> torch.Tensor:
    """A private, contiguous fp32 copy of `value` on the CPU, detached.

    axes: one letter per axis; `sizes` holds the letters already known and learns the others, so that one letter has one size.
    Raises `FormatError` for anything but a finite floating-point tensor of that shape.
    """
    shape = _shape_text(axes, sizes)
    if not isinstance(value, torch.Tensor):
        raise FormatError(
            f"{where}: expected a torch tensor {shape}, found {type(value).__name__}; convert it with torch.as_tensor"
        )
    if not value.is_floating_point():
        raise FormatError(
            f"{where}: expected a floating-point tensor {shape}, found {value.dtype}; convert it with .float()"
        )
    if value.is_meta or value.layout != torch.strided:
        raise FormatError(
            f"{where}: expected a dense tensor with data, found a {value.layout} tensor on {value.device}; load it first"
        )
    if value.ndim != len(axes) or any(
        sizes.get(axis, size) != size for axis, size in zip(axes, value.shape, strict=True)
    ):
        raise FormatError(
            f"{where}: expected shape {shape}, found {list(value.shape)}; the tensors of one patch must agree"
        )
    sizes.update(zip(axes, value.shape, strict=True))
    with torch.inference_mode(False):  # else a value made while serving could never take part in training
        copy = torch.empty(value.shape, dtype=torch.float32)
        copy.copy_(value.detach())
    if not torch.isfinite(copy).all():
        first = (~torch.isfinite(copy)).nonzero()[0].tolist()
        raise FormatError(
            f"{where}: expected finite fp32 numbers, found {copy[tuple(first)].item()} at {first}; "
            "train the edit again (a lower learning rate, no overflow)"
        )
    return copy


def name(value: Any, where: str, *, plain: bool = False) -> str:
    """A non-empty string; `plain`: usable in a tensor name (letters, digits, `_`, `-`, `.`)."""
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{where}: expected a non-empty string, found {value!r}; give it a name")
    if plain and not all(
        part and part.replace("_", "").replace("-", "").isalnum() and part.isascii() for part in value.split(".")
    ):
        raise FormatError(f"{where}: expected letters, digits, '_', '-' and single dots, found {value!r}; rename it")
    return value


def optional_name(value: Any, where: str) -> str | None:
    """`name`, or None."""
    return None if value is None else name(value, where)


def optional_text(value: Any, where: str) -> str | None:
    """Any string, or None."""
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{where}: expected text, found {type(value).__name__}; convert it with str()")
    return value


def optional_integer(value: Any, where: str) -> int | None:
    """A whole number (numpy's too), or None."""
    plain = frozen_json(value, where)
    if plain is not None and (isinstance(plain, bool) or not isinstance(plain, int)):
        raise FormatError(f"{where}: expected a whole number, found {value!r}; give an int")
    return plain


def optional_number(value: Any, where: str) -> float | None:
    """A finite number, or None."""
    plain = frozen_json(value, where)
    if plain is not None and (isinstance(plain, bool) or not isinstance(plain, (int, float))):
        raise FormatError(f"{where}: expected a number, found {value!r}; give a float")
    return None if plain is None else float(plain)


def one_of(value: Any, choices: tuple[str, ...], where: str) -> str:
    """One of the known words."""
    if value not in choices:
        raise FormatError(
            f"{where}: expected one of {', '.join(choices)}, found {value!r}; check the spelling or upgrade xpatch"
        )
    return str(value)


def frozen_mapping(value: Any, where: str) -> MappingProxyType[str, Any]:
    """A read-only copy of a mapping with string keys."""
    if not isinstance(value, Mapping):
        raise FormatError(f"{where}: expected a mapping from names, found {type(value).__name__}; give a dict")
    return MappingProxyType({name(key, f"{where}: a name"): item for key, item in value.items()})


def frozen_rows(value: Any, where: str) -> MappingProxyType[str, tuple[int, ...]]:
    """Part name -> ascending row indices, each named once."""
    rows = {}
    for part, indices in frozen_mapping(value, where).items():
        found = f"{where}, part {part!r}: expected row indices, each once,"
        try:
            listed = tuple(sorted(indices))
        except TypeError:
            raise FormatError(f"{found} found {indices!r}; give a list of numbers") from None
        if any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in listed) or len(
            set(listed)
        ) < len(listed):
            raise FormatError(f"{found} found {list(indices)!r}; give each owned row once, counted from 0")
        rows[part] = listed
    return MappingProxyType(rows)


def frozen_json(value: Any, where: str) -> Any:
    """A read-only copy of plain JSON data: lists become tuples, dicts read-only mappings; numpy scalars become numbers."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return MappingProxyType(
            {name(key, f"{where}: a name"): frozen_json(item, f"{where}.{key}") for key, item in value.items()}
        )
    if isinstance(value, (list, tuple)):
        return tuple(frozen_json(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise FormatError(f"{where}: expected a finite number, found {value}; JSON has no such number")
        return float(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return frozen_json(value.item(), where)
    raise FormatError(
        f"{where}: expected text, a number, a list or a mapping, found {type(value).__name__}; store a plain value"
    )


def thawed(value: Any) -> Any:
    """The opposite of the freezing functions: plain dicts and lists, ready for JSON."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [thawed(item) for item in value]
    return value


def _shape_text(axes: tuple[str, ...], sizes: dict[str, int]) -> str:
    known = [f"{axis}={sizes[axis]}" for axis in dict.fromkeys(axes) if axis in sizes]
    return f"[{', '.join(axes)}]" + (f" with {', '.join(known)}" if known else "")
