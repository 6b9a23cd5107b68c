"""What a figure was measured on and how: the header of every result file."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xpatch.ops import native

VERSIONS = ("xpatch", "torch", "transformers", "tokenizers", "numpy", "onnxruntime")


def header(seeds: Sequence[int] = (), command: Sequence[str] | None = None) -> dict[str, Any]:
    """Machine, versions, seeds, command and date, as JSON values."""
    words = [*_program(Path(sys.argv[0])), *sys.argv[1:]] if command is None else list(command)
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in VERSIONS if (found := _version(name))},
        },
        "seeds": list(seeds),
        "command": " ".join(words),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _program(path: Path) -> list[str]:
    """How `path` is called: a benchmark as a module, anything else by its name."""
    here = path.suffix == ".py" and (Path(__file__).parent / path.name).is_file()
    return ["python", "-m", f"xpatch.benchmarks.{path.stem}"] if here else [path.name]


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def native_build() -> str | None:
    """16 hex digits of the native build, None without one: another kernel is another measurement."""
    path = native.load().__file__ if native.available() else None
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_json(data: Any, path: Path) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file under a temporary name, then rename; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
