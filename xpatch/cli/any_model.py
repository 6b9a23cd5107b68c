"""Any model folder, by the class its config.json names: as a skeleton without weights, or loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xpatch.cli.inputs import load_classifier, model_folder, quiet_transformers
from xpatch.errors import FormatError, MismatchError

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "MTModel")


def load_editable(name: str) -> tuple[Any, Any]:
    """What can be edited, in eval mode and fp32, with its tokenizer: a language model where config.json names the class of one, else a
    sequence classifier (see `load_classifier`).

    Raises as these, and `FormatError` for a language model without a tokenizer.
    """
    try:
        named = json.loads((model_folder(name) / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):  # load_classifier says what is wrong
        named = ""
    if not str(named).endswith(_LANGUAGE_MODELS):
        return load_classifier(name)
    model, tokenizer = load(name)
    if tokenizer is None:
        raise FormatError(
            f"model folder {name} holds a {type(model).__name__} without a tokenizer; save its tokenizer there too (save_pretrained)"
        )
    return model.float().eval(), tokenizer


def skeleton(name: str) -> Any:
    """The model of a folder (or a bundled model's name) on the meta device: modules and shapes, no weights read, no memory.

    Raises `XpatchError` (no such folder), `FormatError` (not a model folder, or a class transformers does not have).
    """
    import torch

    folder = model_folder(name)
    with quiet_transformers():
        kind, config = _class_of(folder)
        try:
            with torch.device("meta"):
                return kind(config).eval()
        except Exception as error:  # a config.json can be wrong in any way
            raise FormatError(
                f"{folder / 'config.json'}: expected the configuration of a {kind.__name__}; found that none can be made: {_reason(error)}; "
                "restore the file"
            ) from error


def load(name: str) -> tuple[Any, Any]:
    """The model with its weights, in eval mode and the precision of its files, and its tokenizer (None without one).

    Raises as `skeleton`, and `MismatchError` where the folder lacks weights the class has.
    """
    import transformers

    folder = model_folder(name)
    with quiet_transformers():
        kind, _ = _class_of(folder)
        try:
            model, loading = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except Exception as error:  # the loaders raise many kinds for a damaged folder
            raise FormatError(
                f"model folder {folder} cannot be loaded as {kind.__name__}: {_reason(error)}; restore its files"
            ) from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception:  # a folder may hold the model alone
            tokenizer = None
    missing = sorted(loading["missing_keys"])
    if missing:
        raise MismatchError(
            f"model folder {folder} holds no trained {kind.__name__}: {len(missing)} tensors are missing, first {missing[0]}; "
            "give a folder with all weights of the class in its config.json"
        )
    return model.eval(), tokenizer


def _class_of(folder: Path) -> tuple[Any, Any]:
    """The class that the folder's config.json names first under `architectures`, else AutoModel's choice, and the config."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise FormatError(
            f"{folder / 'config.json'}: expected a configuration transformers {transformers.__version__} knows; found {_reason(error)}"
        ) from error
    named = list(getattr(config, "architectures", None) or ())
    for name in named:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and hasattr(kind, "from_pretrained"):
            return kind, config
    if named:
        raise FormatError(
            f"{folder / 'config.json'}: expected the name of a transformers class under architectures; found {', '.join(named)}, "
            f"which transformers {transformers.__version__} does not have. Upgrade transformers, or load the model with its own code "
            "and call xpatch.models.find_ffn_sites(model)"
        )
    kind = transformers.AutoModel._model_mapping.get(type(config), None)
    if kind is None:
        raise FormatError(
            f"{folder / 'config.json'}: expected the model's class under architectures; found none, and no default for "
            f"{config.model_type!r}; add it, as save_pretrained does"
        )
    return kind[0] if isinstance(kind, tuple) else kind, config


def _reason(error: Exception) -> str:
    """The first two lines of an error as one; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
