"""`xpatch doctor`: the facts, the exit code, and what it says when something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from xpatch import doctor


@pytest.fixture(autouse=True)
def model_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_verifier", lambda: doctor.Check("bundled verifier", "ok", "1.0 MB"))
    monkeypatch.setattr(doctor, "_native", lambda: {"available": True, "version": "1", "isa": "avx2", "cuda": False})


def test_json(run: Callable[..., Any]) -> None:
    result = run("doctor", "--json")
    found = json.loads(result.out)
    assert result.code == 0
    assert found["ok"] is True
    names = {check["name"] for check in found["checks"]}
    assert {
        "python",
        "xpatch",
        "torch",
        "transformers",
        "onnxruntime",
        "native build",
        "CUDA",
        "bundled verifier",
    } <= names
    assert found["native"]["isa"] == "avx2"
    assert found["threads"]["torch"] >= 1
    assert found["cpu"]["cores"] >= 1


def test_table(run: Callable[..., Any]) -> None:
    result = run("doctor")
    assert result.code == 0
    for word in ("torch", "native build", "ISA avx2", "CUDA", "threads"):
        assert word in result.out


def test_missing_native_build(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_native", lambda: {"available": False, "error": "ImportError: no file"})
    result = run("doctor")
    assert result.code == 1
    assert "ImportError: no file" in result.out


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.5.1+cpu", "onnx": None, "rich": None}
    monkeypatch.setattr(doctor, "_version_of", lambda name: versions.get(name, "99.0"))
    checks = {check.name: check for check in doctor._packages()}
    assert checks["torch"].state == "problem"
    assert "2.6" in checks["torch"].hint
    assert checks["onnx"].state == "optional"
    assert "xpatch[onnx]" in checks["onnx"].hint
    assert checks["rich"].state == "problem"
    assert checks["numpy"].state == "ok"


@pytest.mark.parametrize(
    ("installed", "state", "words"),
    [
        ({}, "optional", "xpatch[onnx-gpu]"),
        ({"onnxruntime": "1.19.2"}, "problem", "1.20 or newer"),
        ({"onnxruntime": "1.24.0", "onnxruntime-gpu": "1.24.0"}, "problem", "overwrite each other"),
    ],
)
def test_builds_of_onnxruntime(
    installed: dict[str, str], state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version_of", installed.get)
    (check,) = doctor._onnxruntime()
    assert (check.name, check.state) == ("onnxruntime", state) and words in check.hint


def test_the_provider_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    _, check = doctor._onnxruntime()
    assert check.state == "ok" and check.found.endswith("ExecutionProvider")
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        monkeypatch.setattr(doctor, "_version_of", {"onnxruntime-gpu": "1.31.0"}.get)
        package, check = doctor._onnxruntime()
        assert package.found == "onnxruntime-gpu 1.31.0"
        assert check.state == "problem" and "runs on the CPU" in check.hint


def test_real_native_info_is_plain_data() -> None:
    from xpatch.ops import native

    json.dumps(native.info())
