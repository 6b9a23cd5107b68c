"""Tensor files that appear whole or not at all: written to a temporary name, brought to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from xpatch.errors import FormatError


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8. Raises `FormatError` where it cannot be written; what was there stays."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors and a few JSON facts in one file. Raises as `write_text` does."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    replace_file(path, lambda temporary: save_file(plain, temporary, metadata={"facts": json.dumps(facts)}))


def read_tensors(path: Path, advice: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises `FormatError`, with `advice` on what to do, for a missing or damaged file."""
    if not path.is_file():
        raise FormatError(f"{path} is missing; {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is damaged: {error}; {advice}") from None


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` to a temporary name beside `path`, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:  # a rename may reach the disk before the bytes do
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FormatError(
            f"{path} cannot be written: {error.strerror or error}; check its folder and permissions"
        ) from None
