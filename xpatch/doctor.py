"""What is installed, what was built, and what is wrong: the facts behind `xpatch doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "optional", "problem"]

REQUIRED = ("torch", "numpy", "safetensors", "pydantic", "transformers", "tokenizers", "typer", "rich")
EXTRAS = {
    "onnx": "onnx", "onnxscript": "onnx", "plotly": "report",
    "fsspec": "remote", "huggingface_hub": "remote", "py3langid": "lid", "cryptography": "sign",
}  # fmt: skip
FLOORS = {"torch": (2, 6), "transformers": (4, 50), "onnxruntime": (1, 20)}
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")


# An ONNX model (IR 8, opset 13) of one Identity node, from x to y, one float each.
_IDENTITY = bytes.fromhex(
    "080812003a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)


@dataclass(frozen=True)
class Check:
    """One line of the report. state: "ok", "optional" (absent, but only needed for an extra) or "problem"; hint: what to do."""

    name: str
    state: State
    found: str
    hint: str = ""


def diagnose() -> dict[str, Any]:
    """Everything `xpatch doctor --json` prints: `checks`, `native`, `cpu`, `threads`, `cuda`, and `ok` (no problem found)."""
    native = _native()
    cuda = _cuda()
    checks = [_python(), *_packages(), *_onnxruntime(), _native_check(native), _cuda_check(cuda), _verifier()]
    return {
        "ok": not any(check.state == "problem" for check in checks),
        "checks": [asdict(check) for check in checks],
        "native": native,
        "cpu": _cpu(),
        "threads": _threads(),
        "cuda": cuda,
    }


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Check("python", "ok", found)


def _packages() -> list[Check]:
    checks = []
    for name in ("xpatch", *REQUIRED, *EXTRAS):
        version = _version_of(name)
        extra = EXTRAS.get(name)
        if version is None and extra is None:
            state: State = "problem"
            hint = (
                f"pip install {name}"
                if name != "xpatch"
                else "the package is not installed; pip install -e . in its folder"
            )
            checks.append(Check(name, state, "not installed", hint))
        elif version is None:
            checks.append(Check(name, "optional", "not installed", f'pip install "xpatch[{extra}]"'))
        else:
            checks.append(_new_enough(name, version))
    return checks


def _new_enough(name: str, version: str) -> Check:
    floor = FLOORS.get(name, ())
    if _numbers(version) < floor:
        wanted = ".".join(map(str, floor))
        return Check(name, "problem", version, f"xpatch needs {name} {wanted} or newer")
    return Check(name, "ok", version)


def _onnxruntime() -> list[Check]:
    """The CPU and the GPU build of ONNX Runtime are two packages that share one folder: each overwrites the other's files."""
    found = {name: version for name in ("onnxruntime", "onnxruntime-gpu") if (version := _version_of(name)) is not None}
    if not found:
        return [
            Check(
                "onnxruntime", "optional", "not installed", 'pip install "xpatch[onnx]", with CUDA "xpatch[onnx-gpu]"'
            )
        ]
    if len(found) > 1:
        both = ", ".join(f"{name} {version}" for name, version in found.items())
        hint = "they overwrite each other: pip uninstall onnxruntime onnxruntime-gpu, then install one of them again"
        return [Check("onnxruntime", "problem", both, hint)]
    ((name, version),) = found.items()
    check = _new_enough("onnxruntime", version)
    if check.state != "ok":
        return [check]
    return [Check("onnxruntime", "ok", version if name == "onnxruntime" else f"{name} {version}"), _provider(name)]


def _provider(package: str) -> Check:
    """Which provider a session really gets: one that cannot load its libraries leaves its place to the next."""
    try:
        import onnxruntime

        offered = [name for name in onnxruntime.get_available_providers() if name.startswith(("CUDA", "CPU"))]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        running = onnxruntime.InferenceSession(_IDENTITY, options, providers=offered).get_providers()[0]
    except Exception as error:
        return Check(
            "ONNX Runtime provider", "problem", f"{type(error).__name__}: {error}"[:200], f"reinstall {package}"
        )
    if package == "onnxruntime-gpu" and not running.startswith("CUDA"):
        hint = "the GPU build runs on the CPU: it finds no device, or not the CUDA and cuDNN libraries it was built for"
        return Check("ONNX Runtime provider", "problem", running, hint)
    return Check("ONNX Runtime provider", "ok", running)


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13)."""
    digits = []
    for part in version.split("+")[0].split(".")[:2]:
        if not part.isdigit():
            break
        digits.append(int(part))
    return tuple(digits)


def _native() -> dict[str, Any]:
    try:
        from xpatch.ops import native

        return dict(native.info())
    except Exception as error:
        return {"available": False, "error": f"{type(error).__name__}: {error}"}


def _native_check(native: dict[str, Any]) -> Check:
    if not native.get("available"):
        hint = "the pure-torch reference is used; install a wheel for this Python, or a C++ compiler and build again"
        return Check("native build", "problem", f"not loaded: {native.get('error')}", hint)
    parts = [str(native[key]) for key in ("version", "compiler") if native.get(key)]
    if native.get("isa"):
        parts.append(f"ISA {native['isa']}")
    parts.append("CUDA kernels built" if native.get("cuda") else "no CUDA kernels")
    if native.get("error"):
        return Check("native build", "problem", ", ".join(parts), str(native["error"]))
    return Check("native build", "ok", ", ".join(parts))


def _cpu() -> dict[str, Any]:
    """The processor's name, the cores this process may use, and the vector extensions the system reports."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            model = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "cores": cores, "flags": [flag for flag in CPU_FLAGS if flag in flags]}


def _threads() -> dict[str, Any]:
    found: dict[str, Any] = {
        name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
    }
    try:
        import torch

        found["torch"] = torch.get_num_threads()
    except ImportError:
        found["torch"] = None
    return found


def _cuda() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"available": False, "toolkit": None, "devices": []}
    available = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if available else []
    return {"available": available, "toolkit": torch.version.cuda, "devices": devices}


def _cuda_check(cuda: dict[str, Any]) -> Check:
    if cuda["available"]:
        return Check("CUDA", "ok", f"{', '.join(cuda['devices'])} (torch built with {cuda['toolkit']})")
    built = f"torch built with {cuda['toolkit']}, no device" if cuda["toolkit"] else "torch without CUDA"
    return Check("CUDA", "optional", built, "patches run on the CPU")


def _verifier() -> Check:
    try:
        from xpatch import zoo

        path = zoo.folder("verifier")
    except Exception as error:
        return Check("bundled verifier", "problem", str(error), "reinstall xpatch")
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return Check("bundled verifier", "ok", f"{size / 1e6:.1f} MB")
