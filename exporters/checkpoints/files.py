"""The weight files of a checkpoint folder: tensors changed in their places, one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from xpatch.errors import MismatchError
from xpatch.models.names import near


class WeightFiles:
    """The safetensors files of `folder`. A tensor keeps its shape and dtype, so its bytes can be written over where they lie."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        if not self._files:
            raise MismatchError(
                f"{folder}: expected weights in safetensors files, found none; save the model with save_pretrained of transformers 4.50 or later"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def change(self, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the tensor `name` by `how` of it in fp32, rounded once to the tensor's own dtype."""
        if name not in self._files:
            raise MismatchError(f"the checkpoint has no tensor {name!r}; it has {near(name, list(self._files))}")
        path = self._files[name]
        with safe_open(path, framework="pt") as file:
            old = file.get_tensor(name)
        new = how(old.float()).to(old.dtype).contiguous()
        data = new.view(-1).view(torch.uint8).numpy().tobytes()
        with open(path, "r+b") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            begin, end = json.loads(raw.read(length))[name]["data_offsets"]
            if end - begin != len(data):
                raise MismatchError(f"{name}: expected {end - begin} bytes, found {len(data)}: shapes differ")
            raw.seek(8 + length + begin)
            raw.write(data)
