"""Finished runs on disk, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import xpatch
from xpatch.evaluation import Report

from .protocol import Protocol


def digest(model: Any) -> str:
    """SHA-256 over names and bytes of every parameter and buffer."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def key(model: Any, protocol: Protocol, overrides: dict[str, Any]) -> str:
    """What decides a run: the model, the texts, the settings and the code."""
    found = hashlib.sha256(f"{digest(model)}{protocol.digest}{sorted(overrides.items())}{torch.__version__}".encode())
    package = Path(xpatch.__file__).parent
    for room in ("editors", "evaluation", "models", "ops", "patches", "runtime"):
        for path in sorted((package / room).rglob("*.py")):
            found.update(ast.dump(ast.parse(path.read_bytes())).encode())  # comments and layout decide nothing
    return found.hexdigest()


def load(store: Path | None) -> tuple[dict[str, Any], Report] | None:
    """A kept row and its report, None where there is none."""
    if store is None or not store.exists():
        return None
    data = json.loads(gzip.decompress(store.read_bytes()))
    return data["row"], Report.model_validate(data["report"])


def keep(store: Path | None, row: dict[str, Any], report: Report) -> None:
    """Keep a row and its report, whole or not at all. The folder tells git to ignore it."""
    if store is None:
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    (store.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    temporary = store.with_name(store.name + ".tmp")
    temporary.write_bytes(gzip.compress(json.dumps({"row": row, "report": report.model_dump(mode="json")}).encode(), 6))
    temporary.replace(store)
