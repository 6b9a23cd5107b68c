"""The optional packages of the ONNX exporters, imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

from xpatch.errors import BackendError

INSTALL = 'pip install "xpatch[onnx]"'


def require(name: str) -> Any:
    """The module `name` (onnx, onnxscript, onnxruntime). Raises `BackendError` with the command that installs it."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise BackendError(
            f"ONNX export needs the package {name!r}, which cannot be imported ({error}); {INSTALL}"
        ) from None
    if name == "onnxruntime" and not hasattr(module, "AdapterFormat"):
        found = getattr(module, "__version__", "an unknown version")
        raise BackendError(f"patches as adapters need onnxruntime >= 1.20, found {found}; {INSTALL} --upgrade")
    return module
