"""sha256 of a model's weights in three precisions, streamed tensor by tensor and cached per model."""

from __future__ import annotations

import hashlib
import weakref
from threading import Lock
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from xpatch.errors import MismatchError

_CHUNK = 1 << 20  # elements hashed at a time: the model is never copied as a whole
_SAMPLE = 64
_ROUNDED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_Stamp = tuple[object, ...]
_cache: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple[_Stamp, Digests]]] = weakref.WeakKeyDictionary()
_lock = Lock()


class Digests(BaseModel):
    """sha256 (hex) of the same weights as fp32, rounded to fp16 and rounded to bf16."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fp32: str
    fp16: str
    bf16: str


def of_tensors(model: torch.nn.Module) -> dict[str, Digests]:
    """Name -> digests of each parameter and persistent buffer, sorted by name; shared parameters once.

    Raises `MismatchError` for weights on the meta device.
    """
    with _lock:
        known = _cache.get(model, {})
        result: dict[str, tuple[_Stamp, Digests]] = {}
        for name, tensor in sorted(_weights(model).items()):
            stamp = _stamp(tensor)
            old = known.get(name)
            result[name] = old if old is not None and old[0] == stamp else (stamp, _hashed(tensor))
        _cache[model] = result
    return {name: value for name, (_, value) in result.items()}


def combined(tensors: dict[str, Digests]) -> Digests:
    """One triple over many, by sorted name."""
    return Digests(
        **{
            precision: hashlib.sha256(
                "\n".join(f"{n} {getattr(d, precision)}" for n, d in sorted(tensors.items())).encode()
            ).hexdigest()
            for precision in Digests.model_fields
        }
    )


def weakest_dtype(model: torch.nn.Module) -> Literal["float32", "float16", "bfloat16"]:
    """The least precise of the dtypes a digest is rounded to; a model half in bf16 counts as bf16."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if torch.bfloat16 in dtypes:
        return "bfloat16"
    return "float16" if torch.float16 in dtypes else "float32"


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                weights[f"{prefix}.{name}" if prefix else name] = buffer
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise MismatchError(
                f"weight {name}: expected its values in memory, found the meta device; load the model's weights first"
            )
    return weights


def _stamp(tensor: torch.Tensor) -> _Stamp:
    """What changes when the tensor does: object, place, version, and (for writes through `.data`) values spread over it."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float64)
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), sample.numpy().tobytes()


def _hashed(tensor: torch.Tensor) -> Digests:
    hashes = {precision: hashlib.sha256(str(list(tensor.shape)).encode()) for precision in Digests.model_fields}
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].cpu()
        if chunk.dtype in _ROUNDED:
            single = chunk.to(torch.float32)
            hashes["fp32"].update(single.numpy().data)
            hashes["fp16"].update(single.to(torch.float16).numpy().data)
            hashes["bf16"].update(single.to(torch.bfloat16).view(torch.int16).numpy().data)
        else:  # integers, quantised weights: the bytes as they are
            raw = chunk.view(torch.uint8).numpy().data
            for digest in hashes.values():
                digest.update(raw)
    return Digests(**{precision: digest.hexdigest() for precision, digest in hashes.items()})
