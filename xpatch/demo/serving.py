"""The patched model at work: ONNX files, parity with PyTorch, and latency with and without patches."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import xpatch
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import PatchNeurons, PatchSet

PARITY_CLAIMS = 16  # claims compared in every language
REPEATS = 31


def onnx_missing() -> str | None:
    """The first package of the ONNX extra that is not installed, None where all are there."""
    return next(
        (name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None), None
    )


def write_onnx(model: Any, tokenizer: Any, patches: PatchSet, out: Path) -> tuple[Path, Path]:
    """`out`/onnx (base with patch slots) and `out`/fixes.onnx_adapter; the model must carry no patches."""
    from xpatch import exporters

    gates = {part.activation for part in patches.parts.values() if isinstance(part, PatchNeurons)}
    base = exporters.export_base(model, out / "onnx", tokenizer=tokenizer, activation=next(iter(gates), "relu"))
    return base, exporters.export_adapter(patches, base, out / "fixes.onnx_adapter")


def parity(model: Any, tokenizer: Any, base: Path, adapter: Path, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """PyTorch against ONNX Runtime, patched and not, on claims in every language: `max_diff`, `changed`, `languages`."""
    from xpatch import exporters

    texts: dict[str, list[str]] = {}
    for request in requests[:PARITY_CLAIMS]:
        for language, version in request.versions.items():
            texts.setdefault(language, []).append(version.text)
    return exporters.verify(model, tokenizer, base, adapter, texts).to_dict()


def latency(
    model: Any, tokenizer: Any, patches: PatchSet, text: str, files: tuple[Path, Path] | None
) -> dict[str, dict[str, float]]:
    """Median milliseconds for one claim, measured in turn: PyTorch and, with `files` (base, adapter), ONNX Runtime.

    The unpatched PyTorch model carries no hook at all; the patched one is a copy of it.
    """
    from xpatch.benchmarks.latency import measure

    batch = dict(tokenizer([text], return_tensors="pt"))
    patched = xpatch.apply(copy.deepcopy(model), patches, name="demo")
    calls: dict[str, Callable[[], Any]] = {
        "PyTorch, unpatched": lambda: _forward(model, batch),
        "PyTorch, patched": lambda: _forward(patched, batch),
    }
    if files is not None:
        calls.update(_onnx_calls(files, batch))
    return measure(calls, repeats=REPEATS)


def _forward(model: Any, batch: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        model(**batch)


def _onnx_calls(files: tuple[Path, Path], batch: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    from xpatch.exporters import Session

    base, adapter = files
    session = Session(base, {"demo": adapter}, threads=torch.get_num_threads())
    arrays = {name: batch[name].numpy() for name in session.base.inputs}
    bare = xpatch.Rows(patches="__base__")
    return {
        "ONNX Runtime, unpatched": lambda: session.run(arrays, xpatch=bare),
        "ONNX Runtime, patched": lambda: session.run(arrays),
    }
