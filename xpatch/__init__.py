"""xpatch: hot-patch the knowledge of multilingual transformer models.

    patches = xpatch.edit(model, tokenizer, requests, method="mpn")  # -> PatchSet, model untouched
    xpatch.save(patches, "fixes/")
    model = xpatch.apply(model, xpatch.load("fixes/"), name="fixes")
    xpatch.remove(model, "fixes")

Names are loaded on first use, so that ``import xpatch`` is quick and needs only torch, numpy, safetensors and pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xpatch._version import __version__
from xpatch.errors import BackendError, ConflictError, FormatError, MismatchError, XpatchError

if TYPE_CHECKING:
    from xpatch.api import Rows, apply, disabled, optimize, prepare, remove, rows, status
    from xpatch.editors import edit, methods
    from xpatch.editors.hyper.train import train_editor
    from xpatch.evaluation import evaluate
    from xpatch.patches.limits import Limits
    from xpatch.patches.requests import EditRequest, Version
    from xpatch.patches.signing import sign, verify
    from xpatch.patches.store import load, save
    from xpatch.patches.types import DenseDelta, Gate, LanguageMask, LowRankDelta, PatchNeurons, PatchSet
    from xpatch.store import PatchStore
    from xpatch.upgrade import retrain
    from xpatch.watch import explain, firings

_HOME = {
    "xpatch.api": ("Rows", "apply", "disabled", "optimize", "prepare", "remove", "rows", "status"),
    "xpatch.editors": ("edit", "methods"),
    "xpatch.editors.hyper.train": ("train_editor",),
    "xpatch.evaluation": ("evaluate",),
    "xpatch.patches.limits": ("Limits",),
    "xpatch.patches.requests": ("EditRequest", "Version"),
    "xpatch.patches.signing": ("sign", "verify"),
    "xpatch.patches.store": ("load", "save"),
    "xpatch.patches.types": ("DenseDelta", "Gate", "LanguageMask", "LowRankDelta", "PatchNeurons", "PatchSet"),
    "xpatch.store": ("PatchStore",),
    "xpatch.upgrade": ("retrain",),
    "xpatch.watch": ("explain", "firings"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_SUBMODULES = ("benchmarks", "editors", "evaluation", "exporters", "models", "ops", "patches", "store", "watch", "zoo")

__all__ = [
    "BackendError",
    "ConflictError",
    "DenseDelta",
    "EditRequest",
    "FormatError",
    "Gate",
    "LanguageMask",
    "Limits",
    "LowRankDelta",
    "MismatchError",
    "PatchNeurons",
    "PatchSet",
    "PatchStore",
    "Rows",
    "Version",
    "XpatchError",
    "__version__",
    "apply",
    "disabled",
    "edit",
    "evaluate",
    "explain",
    "firings",
    "load",
    "methods",
    "optimize",
    "prepare",
    "remove",
    "retrain",
    "rows",
    "save",
    "sign",
    "status",
    "train_editor",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"xpatch.{name}")
    raise AttributeError(f"module 'xpatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
