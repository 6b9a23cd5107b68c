"""Finds the native build, says what it offers, and chooses between it and the pure-torch reference.

Importing this module never fails and loads nothing; a missing or broken build shows on first use. The environment
variable ``XPATCH_BACKEND`` decides (read on first use):

- ``auto`` (default): the native CPU kernels where they were built, otherwise the reference, with one warning. CUDA tensors
  take the reference, that is the framework's own matmuls;
- ``native``: the native kernels on CPU and CUDA; what is missing raises :class:`~xpatch.errors.BackendError`;
- ``reference``: pure torch everywhere.

The native kernels know float32, float16 and bfloat16; other dtypes and devices always take the reference.
``XPATCH_ISA`` (``portable``, ``dotprod``, ``avx2``, ``avx2vnni``, ``avx512``, ``avx512vnni``) lowers the instruction set of the CPU kernels.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from xpatch.errors import BackendError

BACKENDS = ("auto", "native", "reference")

#: torch dtype -> the native code.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.cache
def _attempt() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("xpatch._native"), None
    except Exception as error:  # a broken binary can raise more than ImportError, and import must not fail
        return None, f"{type(error).__name__}: {error}"


def available() -> bool:
    """Whether the native build can be loaded."""
    return _attempt()[0] is not None


def load() -> ModuleType:
    """The native module, loaded on the first call.

    Raises:
        BackendError: there is no native build for this Python, or it cannot be loaded.
    """
    module, error = _attempt()
    if module is None:
        raise BackendError(
            f"the native build of xpatch cannot be loaded: expected a module xpatch._native for {_this_python()}, "
            f"found {_found()} ({error}). Install a wheel for this Python or build from source with a C++ compiler; "
            "set XPATCH_BACKEND=reference to run on pure torch; `xpatch doctor` shows the details."
        )
    return module


@functools.cache
def requested() -> str:
    """The value of XPATCH_BACKEND, checked."""
    wish = os.environ.get("XPATCH_BACKEND", "auto") or "auto"
    if wish not in BACKENDS:
        raise BackendError(f"XPATCH_BACKEND must be one of {', '.join(BACKENDS)}; found {wish!r}")
    return wish


@functools.cache
def backend_for(device_type: str, dtype: torch.dtype) -> str:
    """``"native"`` or ``"reference"``: what runs for tensors of this kind.

    Raises:
        BackendError: ``XPATCH_BACKEND=native`` and this build cannot serve such tensors.
    """
    wish = requested()
    if wish == "reference" or dtype not in DTYPE_CODES or device_type not in ("cpu", "cuda"):
        return "reference"
    if wish == "native":
        if device_type == "cuda" and not load().info()["cuda"]:
            raise BackendError(
                "XPATCH_BACKEND=native, but this native build has no CUDA kernels: expected a build with "
                "XPATCH_CUDA=ON, found a CPU-only one; `xpatch doctor` shows the details."
            )
        load()
        return "native"
    if device_type == "cuda":
        return "reference"
    if not available():
        warnings.warn(
            f"xpatch runs on pure torch: the native build was not loaded ({_attempt()[1]}). `xpatch doctor` shows "
            "the details; XPATCH_BACKEND=reference silences this warning.",
            RuntimeWarning,
            stacklevel=3,
        )
        return "reference"
    return "native"


def reset() -> None:
    """Forget what was found and chosen, so that the next use looks again."""
    for cached in (_attempt, requested, backend_for):
        cached.cache_clear()


def info() -> dict[str, Any]:
    """What ``xpatch doctor`` shows. Never raises.

    Keys: ``available``, ``error`` (why not, or None), ``backend`` (the wish), ``python``, ``found`` (files), ``threads``, and from the
    build itself ``version``, ``compiler``, ``isa`` (in use), ``isas_built``, ``cuda`` (bool), ``cuda_toolkit``.
    """
    module, error = _attempt()
    facts: dict[str, Any] = {
        "available": module is not None,
        "error": error,
        "backend": os.environ.get("XPATCH_BACKEND", "auto") or "auto",
        "python": _this_python(),
        "found": _found(),
        "threads": torch.get_num_threads(),
    }
    if module is not None:
        try:
            facts.update(module.info())
        except ValueError as problem:  # XPATCH_ISA is not a known name
            facts["error"] = str(problem)
    return facts


def _this_python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} on {sys.platform} {platform.machine()}"


def _found() -> str:
    """The native files beside the package, loadable or not."""
    module = _attempt()[0]
    if module is not None and module.__file__:
        return Path(module.__file__).name
    folders = [Path(folder) for folder in sys.modules["xpatch"].__path__]
    names = {file.name for folder in folders for file in folder.glob("_native*") if file.suffix in (".so", ".pyd")}
    return ", ".join(sorted(names)) or "none"
