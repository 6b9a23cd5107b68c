"""A trained editor on disk: `editor.json` (what it is), `editor.safetensors` (its best weights) and `training.safetensors` (to go on).

Every file is written to a temporary name and renamed. What changes while training lies inside the tensor files (their metadata), so no
two files can disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from xpatch.editors import files
from xpatch.editors.files import write_tensors
from xpatch.errors import FormatError
from xpatch.patches.identity import BaseIdentity

__all__ = [
    "CARD",
    "TRAINING",
    "WEIGHTS",
    "EditorCard",
    "LinearCard",
    "fill",
    "read_card",
    "read_tensors",
    "write_card",
    "write_tensors",
]

CARD, WEIGHTS, TRAINING = "editor.json", "editor.safetensors", "training.safetensors"
FORMAT_VERSION = 1


class LinearCard(BaseModel):
    """One edited matrix."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    inside: int
    outside: int


class EditorCard(BaseModel):
    """What an editor is. languages: in the order of the masks' rows, by name. data: digest of the training requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    method: str
    preset: str
    settings: dict[str, Any]
    seed: int
    languages: tuple[str, ...]
    linears: tuple[LinearCard, ...]
    base: BaseIdentity
    data: str


def write_card(folder: Path, card: EditorCard) -> None:
    """Write `editor.json`."""
    files.write_text(folder / CARD, card.model_dump_json(indent=1) + "\n")


def read_card(folder: Path) -> EditorCard:
    """Raises `FormatError` where `folder` holds no editor, or one of another format."""
    path = folder / CARD
    if not path.is_file():
        raise FormatError(
            f"{folder} holds no trained editor: expected {CARD} there; train one with xpatch.train_editor (or `xpatch train-editor`)"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; train the editor again"
            )
        return EditorCard.model_validate(data)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} cannot be read: {error}; train the editor again") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{path}, {field}: {first['msg']}; train the editor again") from None


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises `FormatError` for a missing or damaged file."""
    return files.read_tensors(path, "the editor is not complete: train it again")


def fill(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Load weights strictly. Raises `FormatError` naming the first tensor that is missing or does not fit."""
    own = network.state_dict()
    missing = sorted(own.keys() - tensors.keys()) + sorted(tensors.keys() - own.keys())
    wrong = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or wrong:
        what = f"tensor {missing[0]!r} is missing or unknown" if missing else f"tensor {wrong[0]!r} has another shape"
        raise FormatError(f"{where}: {what}; the file belongs to another editor: train it again")
    network.load_state_dict(dict(tensors))
