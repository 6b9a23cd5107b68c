"""`patch_model.safetensors` as bytes: its header checked against the config before any tensor is made.

The safetensors library takes a repeated name silently and tells little about what is wrong, so the header is read here first:
8 bytes of length (little-endian), a JSON object name -> {dtype, shape, data_offsets}, then the tensors' bytes without a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch

from xpatch.errors import FormatError
from xpatch.patches.jsonl import shorten
from xpatch.patches.limits import Limits
from xpatch.patches.strict_json import read_json

FINGERPRINT_KEY = "xpatch_fingerprint"
DTYPE = "F32"
BYTES_PER_NUMBER = 4
_LENGTH = 8


def most_bytes(expected_bytes: int, limits: Limits) -> int:
    """The largest file that can hold tensors of `expected_bytes`: beyond it there is nothing to read."""
    return _LENGTH + limits.header_bytes + expected_bytes


def write_tensors(tensors: Mapping[str, torch.Tensor], fingerprint: str) -> bytes:
    """The file's bytes."""
    return safetensors.torch.save(dict(tensors), metadata={FINGERPRINT_KEY: fingerprint})


def read_tensors(
    data: bytes, expected: Mapping[str, Sequence[int]], fingerprint: str, *, where: str, limits: Limits
) -> dict[str, torch.Tensor]:
    """The tensors of the file: exactly those `expected` (name -> shape), fp32, of the set with this fingerprint.

    Raises `FormatError` naming the tensor for anything missing, added, repeated, of another dtype or shape, overlapping or
    lying elsewhere than the header says.
    """
    header, begin = _header(data, where, limits)
    metadata = header.pop("__metadata__", {})
    found = metadata.get(FINGERPRINT_KEY) if isinstance(metadata, dict) else None
    if found != fingerprint:
        raise FormatError(
            f"{where}: expected fingerprint {fingerprint[:12]} as in the config, found {str(found)[:12]}; "
            "the two files belong to different sets; copy the whole folder again"
        )
    if not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(where, "metadata that is no text")
    limits.check("tensors", len(header), where)
    for name in sorted(expected.keys() ^ header.keys()):
        state = "is missing" if name in expected else "is not in the config"
        raise FormatError(
            f"{where}: tensor {shorten(name)!r} {state}; the two files belong to different sets; copy the whole folder again"
        )
    _check_layout(header, expected, len(data) - begin, where)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(where, f"{len(data)} bytes that do not parse ({error})") from None


def _header(data: bytes, where: str, limits: Limits) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or size > len(data) - _LENGTH:
        raise _damaged(where, f"{len(data)} bytes that end inside the header")
    limits.check("header_bytes", size, where)
    header = read_json(data[_LENGTH : _LENGTH + size], where=f"{where}, header", limits=limits)
    if not isinstance(header, dict) or data[_LENGTH : _LENGTH + 1] != b"{":
        raise _damaged(where, "a header that does not map names to tensors")
    return header, _LENGTH + size


def _check_layout(header: dict[str, Any], expected: Mapping[str, Sequence[int]], size: int, where: str) -> None:
    places = []
    for name, shape in expected.items():
        entry = header[name]
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _damaged(where, f"tensor {name!r} without exactly dtype, shape and data_offsets")
        found, offsets = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != DTYPE or not _are_sizes(found) or found != list(shape):
            told = shorten(f"{entry['dtype']} {found}")
            raise FormatError(
                f"{where}: tensor {name!r}: expected {DTYPE} {list(shape)}, found {told}; restore the file or save again"
            )
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise _damaged(where, f"tensor {name!r} with offsets {shorten(repr(offsets))}")
        places.append((offsets[0], offsets[1], name, shape))
    end = 0
    for first, last, name, shape in sorted(places):
        numbers = 1
        for axis in shape:
            numbers *= axis
        if first != end or last != first + BYTES_PER_NUMBER * numbers:
            raise _damaged(
                where,
                f"tensor {name!r} at bytes {shorten(str(first))} to {shorten(str(last))}, "
                f"where {BYTES_PER_NUMBER * numbers} bytes from {end} belong",
            )
        end = last
    if end != size:
        raise _damaged(where, f"{size} bytes of tensors where {end} belong")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _damaged(where: str, found: str) -> FormatError:
    return FormatError(
        f"{where}: expected a whole safetensors file, found {found}; "
        "the file is truncated or corrupted, restore it or save the set again"
    )
