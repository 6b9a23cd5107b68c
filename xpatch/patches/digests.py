"""sha256 of a model's weights in three precisions, streamed tensor by tensor and cached per model.

Quantised weights are left out: libraries repack them per device and after first use, so their bytes say nothing lasting.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from xpatch.errors import MismatchError
from xpatch.patches import weights
from xpatch.patches.locks import new_lock

_CHUNK = 1 << 20  # elements hashed at a time: the model is never copied as a whole
_SAMPLE = 64
_ROUNDED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_Stamp = tuple[object, ...]
_cache: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple[_Stamp, Digests]]] = weakref.WeakKeyDictionary()
_lock = new_lock()


class Digests(BaseModel):
    """sha256 (hex) of the same weights as fp32, rounded to fp16 and rounded to bf16."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fp32: str
    fp16: str
    bf16: str


def of_tensors(model: torch.nn.Module) -> dict[str, Digests]:
    """Name -> digests of each unquantised parameter and persistent buffer, sorted by name; shared parameters once.

    Names are those of the plain model: adapters are left out (`xpatch.patches.weights`). Offloaded weights are loaded one by one.
    Raises `MismatchError` for weights on the meta device that nothing can load.
    """
    with _lock:
        known = _cache.get(model, {})
        result: dict[str, tuple[_Stamp, Digests]] = {}
        elsewhere, may_be_shared = weights.offloaded(model), weights.tied(model)
        owners: dict[Digests, str] = {}
        copies: set[str] = set()
        for name, tensor in _weights(model).items():
            values = _loaded(name, elsewhere.get(id(tensor))) if tensor.is_meta else tensor
            stamp = _stamp(values)
            if tensor.is_meta:
                stamp = stamp[2:]  # the object and its place are others each time
            old = known.get(name)
            result[name] = old if old is not None and old[0] == stamp else (stamp, _hashed(values))
            owner = owners.setdefault(result[name][1], name)
            if owner != name and tensor.is_meta and (may_be_shared(name) or may_be_shared(owner)):
                copies.add(name)
        _cache[model] = result
    return {name: value for name, (_, value) in sorted(result.items()) if name not in copies}


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


def unquantised(model: torch.nn.Module, tensors: dict[str, Digests]) -> Digests | None:
    """One triple over what quantising a model leaves as it is: embeddings, norms and biases, whatever they are called.

    tensors: `of_tensors(model)`. The same for a model and its quantised copies; None for a model without any of them.
    """
    embeddings = tuple(name for name, module in weights.named_modules(model) if isinstance(module, torch.nn.Embedding))
    kept = [
        tensors[name]
        for name, parameter in _parameters(model)
        if name in tensors and (parameter.ndim <= 1 or name.rpartition(".")[0] in embeddings)
    ]
    if not kept:
        return None
    # By content, not by name: a quantised head has a bias of its own where it was tied before.
    contents = {name: sorted({getattr(each, name) for each in kept}) for name in Digests.model_fields}
    return Digests(
        **{name: hashlib.sha256("\n".join(values).encode()).hexdigest() for name, values in contents.items()}
    )


def quantisation(model: torch.nn.Module) -> str | None:
    """What quantised `model`: the method its config names, else the library its weights are of; None if nothing did."""
    config: Any = getattr(model, "config", None)
    named = getattr(config, "quantization_config", None)
    if named is not None:
        method = named.get("quant_method") if isinstance(named, dict) else getattr(named, "quant_method", None)
        return str(getattr(method, "value", method) or "unknown")
    for parameter in model.parameters():
        if _is_quantised(parameter):
            return type(parameter).__module__.partition(".")[0]
    return "torch" if any(_packed(module) for module in model.modules()) else None


def weakest_dtype(model: torch.nn.Module) -> Literal["float32", "float16", "bfloat16"]:
    """The least precise of the dtypes a digest is rounded to; a model half in bf16 counts as bf16."""
    dtypes = {parameter.dtype for _, parameter in weights.named_parameters(model)}
    if torch.bfloat16 in dtypes:
        return "bfloat16"
    return "float16" if torch.float16 in dtypes else "float32"


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter for name, parameter in _parameters(model) if not _is_quantised(parameter)}
    for prefix, module in weights.named_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _loaded(name: str, load: Callable[[], torch.Tensor] | None) -> torch.Tensor:
    if load is None:
        raise MismatchError(
            f"weight {name}: expected its values in memory, found the meta device; load the model's weights first"
        )
    try:
        return load()
    except (OSError, KeyError) as error:
        raise MismatchError(
            f"weight {name}: expected its values where accelerate offloaded them, found {error!r}; load the model again, or give "
            "its offload folder back"
        ) from None


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, shared ones once, and the biases torch's own quantised layers keep out of sight."""
    yield from weights.named_parameters(model)
    for prefix, module in weights.named_modules(model):
        if _packed(module) and module.bias() is not None:  # type: ignore[operator]
            yield f"{prefix}.bias", module.bias()  # type: ignore[operator]


def _is_quantised(parameter: torch.Tensor) -> bool:
    wraps = hasattr(parameter, "__tensor_flatten__") and not type(parameter).__module__.startswith("torch.distributed")
    return wraps or not parameter.is_floating_point() or parameter.dtype.itemsize == 1


def _packed(module: torch.nn.Module) -> bool:
    """torch.ao.nn.quantized's linears: `weight()` and `bias()` are functions."""
    return callable(getattr(module, "weight", None)) and callable(getattr(module, "bias", None))


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
