"""Headers of the tensor file that lie: about places, lengths, shapes and types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.patches.conftest import soon
from xpatch.errors import FormatError
from xpatch.patches import store


def headers(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / store.TENSOR_FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(folder: Path, header: str, body: bytes, size: int | None = None) -> None:
    text = header.encode()
    (folder / store.TENSOR_FILE).write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + body)


KEYS, BIAS = "neurons.0.keys", "neurons.0.bias"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (lambda h: h[KEYS].update(data_offsets=[4, 68]), "where 64 bytes from 8 belong"),
    "gap": (lambda h: h[BIAS].update(data_offsets=[0, 12]), "where 8 bytes from 0 belong"),
    "two at one place": (lambda h: h[KEYS].update(data_offsets=h["neurons.0.values"]["data_offsets"]), "bytes from"),
    "beyond the file": (lambda h: h[KEYS].update(data_offsets=[8, 2**63]), "bytes from"),
    "negative": (lambda h: h[KEYS].update(data_offsets=[-8, 8]), "with offsets"),
    "a shape that overflows": (lambda h: h[KEYS].update(shape=[2**32, 2**32]), "expected F32 [2, 8]"),
    "another dtype": (lambda h: h[KEYS].update(dtype="F16"), "expected F32 [2, 8], found F16 [2, 8]"),
    "a dtype of no name": (lambda h: h[KEYS].update(dtype={"x": 1}), "expected F32 [2, 8]"),
    "true for a size": (lambda h: h[BIAS].update(shape=[True]), "expected F32 [2]"),
    "a field more": (lambda h: h[KEYS].update(strides=[1]), "without exactly dtype, shape and data_offsets"),
    "no tensors but a list": (lambda h: h.update({KEYS: []}), "without exactly dtype, shape and data_offsets"),
    "metadata of another kind": (lambda h: h["__metadata__"].update(more=1), "metadata that is no text"),
    "metadata no object": (lambda h: h.update(__metadata__=[]), "expected fingerprint"),
    "a tensor missing": (lambda h: h.pop(BIAS), "tensor 'neurons.0.bias' is missing"),
    "a tensor more": (lambda h: h.update({"../x": h[BIAS]}), "tensor '../x' is not in the config"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(folder: Path, name: str) -> None:
    change, told = HEADERS[name]
    header, body = headers(folder)
    change(header)
    write_header(folder, json.dumps(header), body)
    with pytest.raises(FormatError) as error:
        store.load(folder)
    assert told in str(error.value)


@pytest.mark.parametrize("size", [2**64 - 1, 2**63, 10**9, 0, 1, 7])
def test_headers_that_lie_about_their_length(folder: Path, size: int) -> None:
    header, body = headers(folder)
    write_header(folder, json.dumps(header), body, size)
    with soon(), pytest.raises(FormatError, match="expected a whole safetensors file|expected JSON"):
        store.load(folder)


def test_a_tensor_twice_in_the_header(folder: Path) -> None:
    """The safetensors library takes the last one silently."""
    header, body = headers(folder)
    write_header(folder, json.dumps(header)[:-1] + f', "{BIAS}": {json.dumps(header[BIAS])}' + "}", body)
    with pytest.raises(FormatError, match="header: expected JSON, found the key 'neurons.0.bias' twice"):
        store.load(folder)


@pytest.mark.parametrize("more", [b"\0", b"\0" * 4, b"\0" * 4096])
def test_bytes_no_tensor_owns(folder: Path, more: bytes) -> None:
    header, body = headers(folder)
    write_header(folder, json.dumps(header), body + more)
    with pytest.raises(FormatError, match="bytes of tensors where"):
        store.load(folder)
