"""Builds the core on its own: the native tests under sanitizers, and with and without CUDA.

The CUDA kernels run here on the emulator (tests/csrc/cuda_emulator.h); where there is a GPU, the same tests run on it, also under
compute-sanitizer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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


# In the order of preference; a name above what the machine has runs the best below it, and its output says which.
ISAS = ["portable", "dotprod", "avx2", "avx2vnni", "avx512", "avx512vnni"]
with_sanitizers = pytest.mark.skipif(os.name == "nt", reason="the sanitizers of GCC and Clang")


def run_on(isa, *command):
    found = run(*command, XPATCH_ISA=isa)
    if not found.rstrip().endswith(f", {isa}"):
        pytest.skip(f"this machine or build has no {isa}: {found.strip()}")
    return found


@with_sanitizers
@pytest.mark.parametrize("isa", ISAS)
def test_core_under_sanitizers(sanitized, isa):
    assert "shapes" in run_on(isa, sanitized)


@with_sanitizers
@pytest.mark.parametrize("isa", ISAS)
def test_key_packer_on_random_and_damaged_bytes(sanitized, isa):
    seed = 1 + ISAS.index(isa)
    assert "3000 inputs" in run_on(isa, sanitized.with_name("xpatch_fuzz_pack"), "3000", str(seed))


@with_sanitizers
def test_thread_pool_under_thread_sanitizer(tmp_path):
    build(tmp_path, XPATCH_CUDA="OFF", XPATCH_NATIVE_TESTS="ON", XPATCH_SANITIZE="THREAD")
    assert "shapes" in run(tmp_path / "xpatch_native_tests", "few", TSAN_OPTIONS="halt_on_error=1")


def test_builds_without_cuda(tmp_path):
    assert "CUDA kernels OFF" in build(tmp_path, XPATCH_CUDA="OFF")


@pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")
def test_cuda_kernels_on_the_emulator_under_sanitizers(sanitized):
    assert "shapes" in run(sanitized.with_name("xpatch_cuda_emulated_tests"), "60")


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module")
def with_cuda(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_cuda")
    assert "CUDA kernels ON" in build(folder, XPATCH_CUDA="ON", XPATCH_NATIVE_TESTS="ON")
    return folder / "xpatch_cuda_tests"


@needs_nvcc
def test_builds_with_cuda(with_cuda):
    assert with_cuda.exists()


@needs_nvcc
def test_cuda_kernels_on_the_gpu(with_cuda):
    done = subprocess.run([with_cuda, "2000"], capture_output=True, text=True, timeout=SLOW_BUILD)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0 and "shapes" in done.stdout, done.stdout + done.stderr


@needs_nvcc
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_cuda_kernels_under_compute_sanitizer(with_cuda, tool):
    if subprocess.run([with_cuda, "0"], capture_output=True, timeout=SLOW_BUILD).returncode == 77:
        pytest.skip("no CUDA device")
    run("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", with_cuda, "60")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cuda_kernels_need_no_spills_and_no_more_shared_memory_than_every_gpu_has(architecture, tmp_path):
    command = ("nvcc", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch={architecture}", "-cubin", "-Xptxas", "-v")
    source = ROOT / "csrc/ops/patch_ffn_cuda.cu"
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernels.cubin", source], capture_output=True, text=True, timeout=SLOW_BUILD
    )
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill", done.stderr)
    shared = re.findall(r"(\d+) bytes smem", done.stderr)
    assert len(spilled) > 40 and set(spilled) == {"0"}
    assert shared and max(map(int, shared)) <= 48 * 1024


@needs_nvcc
def test_cuda_kernels_load_16_bytes_and_use_tensor_cores(tmp_path):
    ptx = tmp_path / "kernels.ptx"
    source = ROOT / "csrc/ops/patch_ffn_cuda.cu"
    run("nvcc", "-std=c++17", f"-I{ROOT / 'csrc'}", "-arch=compute_90", "-ptx", "-o", ptx, source)
    code = ptx.read_text(encoding="utf-8")
    assert ".target sm_90" in code
    kernels = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", code, re.S))
    for name in ("stream_scores", "tile_scores", "mix"):
        found = [body for kernel, body in kernels.items() if name in kernel]
        assert found and all("ld.global.nc.v4" in body for body in found), name
    tiles = [(kernel, "wmma.mma" in body) for kernel, body in kernels.items() if "tile_scores" in kernel]
    assert len(tiles) == 9 and all(cores == ("tile_scoresIf" not in kernel) for kernel, cores in tiles)
