"""The token inputs and caches of a call: checked, with defaults for what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xpatch.errors import ConflictError, MismatchError
from xpatch.exporters.description import PAST, CacheTensor, OnnxBase
from xpatch.exporters.feed import Array


def prepared(base: OnnxBase, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """The inputs of `Session.run` as arrays, int64 tokens and fp32 caches; a cache that is left out is empty.

    Raises `ConflictError` for inputs that belong to patches, `MismatchError` for unknown names, wrong shapes or half a cache.
    """
    collisions = sorted(base.optional_inputs.intersection(inputs))
    if collisions:
        raise ConflictError(f"inputs {', '.join(collisions)} belong to patches; apply a patch set instead")
    known = {*base.inputs, *(PAST + one.name for one in base.cache)}
    if base.kind == "encoder-decoder":
        known.add("decoder_input_ids")
    unknown = sorted(set(inputs).difference(known))
    if unknown:
        shown = [*base.inputs, *(["decoder_input_ids"] if base.kind == "encoder-decoder" else [])]
        cache = f" and a cache, {PAST}*" if base.cache else ""
        raise MismatchError(f"unknown inputs {', '.join(unknown)}; the exported base takes {', '.join(shown)}{cache}")
    return {"logits": _logits, "decoder": _decoder, "encoder-decoder": _encoder_decoder}[base.kind](base, inputs)


def _logits(base: OnnxBase, inputs: Mapping[str, Any]) -> dict[str, Array]:
    ids = _ids(inputs, "input_ids", base.max_tokens)
    found = {"input_ids": ids}
    for name in base.inputs[1:]:
        default = np.ones_like(ids) if name == "attention_mask" else np.zeros_like(ids)
        found[name] = np.asarray(inputs[name], np.int64) if name in inputs else default
        if found[name].shape != ids.shape:
            raise MismatchError(
                f"{name}: expected the shape of input_ids, {list(ids.shape)}, found {list(found[name].shape)}"
            )
    return found


def _decoder(base: OnnxBase, inputs: Mapping[str, Any]) -> dict[str, Array]:
    ids = _ids(inputs, "input_ids", base.max_tokens)
    past = _past(base.cache, inputs, len(ids))
    total = _length(base.cache, past) + ids.shape[1]
    if base.max_tokens is not None and total > base.max_tokens:
        raise MismatchError(
            f"input_ids: {ids.shape[1]} tokens behind {total - ids.shape[1]} in the cache, expected at most {base.max_tokens} together"
        )
    return {"input_ids": ids, "attention_mask": _mask(inputs, (len(ids), total)), **past}


def _encoder_decoder(base: OnnxBase, inputs: Mapping[str, Any]) -> dict[str, Array]:
    own, cross = ([one for one in base.cache if one.cross is kind] for kind in (False, True))
    found: dict[str, Array] = {}
    if any(PAST + one.name in inputs for one in cross):
        found |= _past(cross, inputs, None)
        length = _length(cross, found)
        rows = len(found[PAST + cross[0].name])
    else:
        found["input_ids"] = _ids(inputs, "input_ids", base.max_tokens)
        rows, length = found["input_ids"].shape
    found["attention_mask"] = _mask(inputs, (rows, length))
    default = np.full((rows, 1), base.start_token or 0, np.int64)
    said = _ids({"decoder_input_ids": inputs.get("decoder_input_ids", default)}, "decoder_input_ids", base.max_tokens)
    if len(said) != rows:
        raise MismatchError(f"decoder_input_ids: expected {rows} rows, as the text has, found {len(said)}")
    return {**found, "decoder_input_ids": said, **_past(own, inputs, rows)}


def _ids(inputs: Mapping[str, Any], name: str, longest: int | None) -> Array:
    if name not in inputs:
        raise MismatchError(f"expected {name} [batch, tokens], found {', '.join(inputs) or 'nothing'}")
    ids = np.asarray(inputs[name], np.int64)
    if ids.ndim != 2 or (longest is not None and ids.shape[1] > longest):
        limit = "" if longest is None else f" with at most {longest} tokens"
        raise MismatchError(f"{name}: expected [batch, tokens]{limit}, found {list(ids.shape)}")
    return ids


def _mask(inputs: Mapping[str, Any], shape: tuple[int, int]) -> Array:
    mask = np.asarray(inputs["attention_mask"], np.int64) if "attention_mask" in inputs else np.ones(shape, np.int64)
    if mask.shape != shape:
        raise MismatchError(f"attention_mask: expected {list(shape)}, cached tokens included, found {list(mask.shape)}")
    return mask


def _past(tensors: Sequence[CacheTensor], inputs: Mapping[str, Any], rows: int | None) -> dict[str, Array]:
    names = [PAST + one.name for one in tensors]
    given = [name for name in names if name in inputs]
    if not given:
        return {
            name: np.zeros((rows or 0, one.heads, 0, one.width), np.float32)
            for name, one in zip(names, tensors, strict=True)
        }
    if len(given) < len(names):
        missing = next(name for name in names if name not in inputs)
        raise MismatchError(f"a cache has {len(names)} tensors, found {len(given)}; {missing} is missing")
    found = {name: np.asarray(inputs[name], np.float32) for name in names}
    first = found[names[0]]
    rows = len(first) if rows is None else rows
    length = first.shape[2] if first.ndim == 4 else 0
    for name, one in zip(names, tensors, strict=True):
        if found[name].shape != (rows, one.heads, length, one.width):
            raise MismatchError(
                f"{name}: expected {[rows, one.heads, length, one.width]} [batch, heads, tokens, width], found {list(found[name].shape)}"
            )
    return found


def _length(tensors: Sequence[CacheTensor], past: Mapping[str, Array]) -> int:
    return past[PAST + tensors[0].name].shape[2] if tensors else 0
