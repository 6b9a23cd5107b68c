"""The CPU kernels compile for 64-bit ARM, with and without its dot-product instructions (the Clang of the package ziglang)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "csrc/screen/screen_cpu.cpp", *sorted((ROOT / "csrc/ops").glob("*_cpu.cpp"))]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed"),
]


@pytest.mark.parametrize(("isa", "flags"), [("portable", []), ("dotprod", ["-mcpu=generic+dotprod"])])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_neon(tmp_path, source, isa, flags):
    command = [
        *(sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu", *flags),
        *(
            "-std=c++17",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unused-command-line-argument",
            f"-DXPATCH_ISA={isa}",
            "-DXPATCH_HAS_DOTPROD",
        ),
        *("-I", str(ROOT / "csrc"), "-S", str(source), "-o", str(tmp_path / "out.s")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    if source.stem == "screen_cpu":
        assert ("sdot" in (tmp_path / "out.s").read_text()) == (isa == "dotprod")
