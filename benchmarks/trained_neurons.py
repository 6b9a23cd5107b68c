"""Neurons really trained by `mpn`, in blocks on disk, so that an interrupted run goes on where it stopped.

A block is one `xpatch.edit` call over `BLOCK` claims of the edit split; blocks are put side by side as sets of patches are in a
served model. `gather` makes blocks until there are enough neurons; `rows` reads the rows to time them on.
"""

from __future__ import annotations

import ast
import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import xpatch

from . import cache, texts
from .trained_base import Base, Report, write

FOLDER = Path(__file__).parent / "results" / "trained.work"
BLOCK = 512  # claims of one edit call
MEMORY = 1000  # claims per language that edits must leave alone
TENSORS = ("keys", "bias", "values")


@dataclass(frozen=True)
class Trained:
    """keys `[N, D]`, bias `[N]`, values `[N, D]` fp32, activation, and what became of the claims: status -> number, over all blocks."""

    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    activation: str
    info: Mapping[str, Any]


def gather(
    base: Base, preset: str, neurons: int, seed: int = 0, *, folder: Path | None = None, report: Report | None = None,
    block: int = BLOCK, memory: int = MEMORY, **overrides: Any,
) -> Trained:  # fmt: skip
    """At least `neurons` neurons, as many whole blocks as that takes.

    seed: which claims, and how they are trained. folder: where blocks are kept, if anywhere. block: claims of one edit call; memory: claims
    per language. overrides: settings instead of the preset's. Raises `XpatchError` where a block gives no neuron.
    """
    settings = dict(overrides)
    spared = texts.memory(base.languages, memory)
    kept = None
    if folder is not None:
        first = [request.model_dump(mode="json") for request in texts.requests(seed, 0, block, base.languages)]
        kept = folder / f"{preset}-{key(base, [preset, settings, seed, first, spared])}"
    found: list[Trained] = []
    while sum(len(part.bias) for part in found) < neurons:
        number = len(found)
        path = None if kept is None else kept / f"{number:03}.safetensors"
        if path is None or not path.is_file():
            patches = xpatch.edit(
                base.model, base.tokenizer, texts.requests(seed, number * block, (number + 1) * block, base.languages),
                method="mpn", preset=preset, memory=spared, seed=seed,
                progress=report or False, **settings,
            )  # fmt: skip
            base.forget()
            made = _of(patches, base)
            if path is not None:
                header = {"info": json.dumps(made.info), "activation": made.activation}
                write(path, {name: getattr(made, name) for name in TENSORS}, header)
        else:
            made = _read(path)
        if not len(made.bias):
            raise xpatch.XpatchError(
                f"block {number} of {block} claims gave no neuron: {made.info['claims']}; take larger blocks or more steps"
            )
        found.append(made)
    claims = sum((collections.Counter(part.info["claims"]) for part in found), collections.Counter())
    seconds = sum(part.info["seconds"] for part in found)
    info = {"claims": dict(claims), "blocks": len(found), "seconds": round(seconds, 1), "settings": settings}
    keys, bias, values = (torch.cat([getattr(part, name) for part in found]) for name in TENSORS)
    return Trained(keys, bias, values, found[0].activation, info)


def rows(
    base: Base, sentences: Sequence[str], positions: str, limit: int | None = None, batch: int = 64
) -> dict[str, torch.Tensor]:
    """x `[M, D]`, what enters the last FFN, and y `[M, D]`, what leaves it, for `sentences`.

    positions "read": the row the head reads, one a sentence; "tokens": the rows of all tokens. Stops after `limit` rows.
    """
    layer = base.model.bert.encoder.layer[-1]
    seen: dict[str, list[torch.Tensor]] = {"x": [], "y": []}
    now: dict[str, torch.Tensor] = {}
    hooks = [
        layer.intermediate.register_forward_hook(lambda module, args, output: now.__setitem__("x", args[0])),
        layer.output.dense.register_forward_hook(lambda module, args, output: now.__setitem__("y", output)),
    ]
    try:
        with torch.no_grad():
            for start in range(0, len(sentences), batch):
                inputs = base.tokenizer(
                    list(sentences[start : start + batch]), padding=True, truncation=True, return_tensors="pt"
                )
                base.model(**inputs)
                mask = inputs["attention_mask"].bool()
                for name, value in now.items():
                    seen[name].append((value[:, 0] if positions == "read" else value[mask]).clone())
                if limit is not None and sum(map(len, seen["x"])) >= limit:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    base.forget()
    return {name: torch.cat(parts)[:limit] for name, parts in seen.items()}


def key(base: Base, settings: Sequence[Any]) -> str:
    """16 hex digits over what decides a training: the classifier's weights, the settings and texts given, the editors' code."""
    found = hashlib.sha256(f"{cache.digest(base.model)}{json.dumps(settings, sort_keys=True, default=str)}".encode())
    package = Path(xpatch.__file__).parent
    for path in sorted((package / "editors").rglob("*.py")):
        found.update(ast.dump(ast.parse(path.read_bytes())).encode())  # comments and layout decide nothing
    return found.hexdigest()[:16]


def _of(patches: xpatch.PatchSet, base: Base) -> Trained:
    claims = collections.Counter(record.status for record in patches.edits)
    part = next(iter(patches.parts.values()), None)
    seconds = sum(record.seconds or 0.0 for record in patches.edits)
    info = {"claims": dict(claims), "seconds": round(seconds, 1)}
    if not isinstance(part, xpatch.PatchNeurons):
        width = base.model.config.hidden_size
        return Trained(torch.zeros(0, width), torch.zeros(0), torch.zeros(0, width), "relu", info)
    return Trained(part.keys, part.bias, part.values, part.activation, info)


def _read(path: Path) -> Trained:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        keys, bias, values = (file.get_tensor(name) for name in TENSORS)
    return Trained(keys, bias, values, header["activation"], json.loads(header["info"]))
