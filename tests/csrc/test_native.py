"""Builds the core on its own: the native tests under sanitizers, and the module with and without CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW_BUILD = 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH"),
]


def run(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SLOW_BUILD,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def build(folder, **options):
    defines = [f"-D{name}={value}" for name, value in {"XPATCH_PYTHON": "OFF", **options}.items()]
    configured = run("cmake", "-S", ROOT, "-B", folder, *defines)
    run("cmake", "--build", folder)
    return configured


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    build(folder, XPATCH_CUDA="OFF", XPATCH_NATIVE_TESTS="ON", XPATCH_SANITIZE="ON", CMAKE_BUILD_TYPE="RelWithDebInfo")
    return folder / "xpatch_native_tests"


@pytest.mark.skipif(os.name == "nt", reason="the sanitizers of GCC and Clang")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_core_under_sanitizers(sanitized, isa):
    assert "shapes" in run(sanitized, XPATCH_ISA=isa)


def test_builds_without_cuda(tmp_path):
    assert "CUDA kernels OFF" in build(tmp_path, XPATCH_CUDA="OFF")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_builds_with_cuda(tmp_path):
    assert "CUDA kernels ON" in build(tmp_path, XPATCH_CUDA="ON")
