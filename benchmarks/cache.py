"""Finished runs on disk, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
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


def key(model: Any, protocol: Protocol, settings: Mapping[str, Any], method: str | None = None) -> str:
    """What decides a run: the model, the texts, the settings and the code, of one method or of all.

    A setting `editor` counts by its folder's files, not by its path.
    """
    decided = {name: _editor(value) if name == "editor" else value for name, value in settings.items()}
    found = hashlib.sha256(f"{digest(model)}{protocol.digest}{sorted(decided.items())}{torch.__version__}".encode())
    found.update(_code(method))
    return found.hexdigest()


@functools.cache
def _code(method: str | None) -> bytes:
    package = Path(xpatch.__file__).parent
    found = hashlib.sha256()
    for room in ("evaluation", "models", "ops", "patches", "runtime"):
        for path in sorted((package / room).rglob("*.py")):
            found.update(_meaning(path.read_text(encoding="utf-8")))
    folders = _folders(package / "editors", method)
    for path in sorted((package / "editors").rglob("*.py")):
        where = path.relative_to(package / "editors").parts
        if len(where) == 1 or where[0] in folders:
            found.update(_meaning(path.read_text(encoding="utf-8")))
    return found.digest()


def _folders(editors: Path, method: str | None) -> set[str]:
    """The folders of the editor called `method` and of those whose code it imports; all where none names it."""
    sources = {
        folder.name: "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
        for folder in editors.iterdir()
        if folder.is_dir()
    }
    wanted = [name for name, source in sources.items() if method and f'"{method}"' in source]
    if not wanted:
        return set(sources)
    reached: set[str] = set()
    while wanted:
        name = wanted.pop()
        reached.add(name)
        imported = set(re.findall(r"xpatch\.editors\.(\w+)", sources[name]))
        wanted += [other for other in imported if other in sources and other not in reached]
    return reached


def _meaning(source: str) -> bytes:
    """The code without comments and layout, and without the list of all editors, which decides nothing about one."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "_MODULES" for t in node.targets))
    ]
    return ast.dump(tree).encode()


def _editor(folder: Any) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in Path(str(folder)).rglob("*") if p.is_file() and not p.name.startswith("training")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def load(store: Path | None) -> tuple[dict[str, Any], dict[str, Report]] | None:
    """A kept row and its reports by name, None where there is none."""
    if store is None or not store.exists():
        return None
    data = json.loads(gzip.decompress(store.read_bytes()))
    return data["row"], {name: Report.model_validate(found) for name, found in data["reports"].items()}


def keep(store: Path | None, row: dict[str, Any], reports: Mapping[str, Report]) -> None:
    """Keep a row and its reports, whole or not at all."""
    if store is None:
        return
    prepare(store.parent)
    temporary = store.with_name(store.name + ".tmp")
    data = {"row": row, "reports": {name: found.model_dump(mode="json") for name, found in reports.items()}}
    temporary.write_bytes(gzip.compress(json.dumps(data).encode(), 6))
    temporary.replace(store)


def prepare(folder: Path) -> None:
    """Make the folder, which tells git to ignore it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
