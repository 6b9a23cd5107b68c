"""Bundled small multilingual models: plain Hugging Face objects, in eval mode, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xpatch.errors import XpatchError

MODELS = {"verifier": "BertForSequenceClassification"}


def folder(name: str) -> Path:
    """Where a bundled model lies. Raises `XpatchError` with the known names, or with what to do when the files are not there."""
    if name not in MODELS:
        raise XpatchError(f"no bundled model {name!r}; bundled models: {', '.join(sorted(MODELS))}")
    path = Path(__file__).parent / name / "model"
    if not (path / "config.json").exists():
        raise XpatchError(f"the files of the bundled model {name!r} are missing at {path}; reinstall xpatch")
    return path


def load(name: str) -> tuple[Any, Any]:
    """`load("verifier") -> (model, tokenizer)`; stored in fp16, loaded in fp32, eval mode."""
    import transformers

    path = folder(name)
    model = getattr(transformers, MODELS[name]).from_pretrained(path, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.float().eval(), tokenizer


__all__ = ["MODELS", "folder", "load"]
