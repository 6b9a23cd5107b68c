"""Choosing the backend, and what happens when the native build is not there."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import warnings

import pytest
import torch

from xpatch.errors import BackendError
from xpatch.ops import native, patch_ffn, reference

BLOCK_NATIVE = "import sys; sys.modules['xpatch._native'] = None\n"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("XPATCH_BACKEND", raising=False)
    native.reset()
    yield
    monkeypatch.undo()
    native.reset()


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setitem(sys.modules, "xpatch._native", None)


def draw(rows=3):
    return torch.randn(rows, 4), torch.randn(5, 4), torch.randn(5), torch.randn(5, 2)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_info_of_this_build():
    facts = native.info()
    assert facts["available"] and facts["error"] is None
    assert facts["isa"] in facts["isas_built"] and "portable" in facts["isas_built"]
    assert isinstance(facts["cuda"], bool)
    assert facts["threads"] == torch.get_num_threads()


def test_missing_build_falls_back_with_one_warning(no_native):
    tensors = draw()
    with pytest.warns(RuntimeWarning, match="xpatch doctor"):
        found = patch_ffn(*tensors, "relu")
    assert torch.equal(found, reference.patch_ffn(*tensors, "relu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_ffn(*tensors, "relu")


def test_missing_build_raises_on_first_use_when_asked_for(no_native, monkeypatch):
    monkeypatch.setenv("XPATCH_BACKEND", "native")
    with pytest.raises(BackendError) as caught:
        patch_ffn(*draw(), "relu")
    for word in ("expected", "found", "xpatch doctor", "XPATCH_BACKEND=reference"):
        assert word in str(caught.value)


def test_missing_build_is_shown_not_raised(no_native):
    facts = native.info()
    assert not facts["available"] and "xpatch._native" in facts["error"]


def test_import_works_without_the_build():
    code = BLOCK_NATIVE + "import xpatch, xpatch.ops; print('imported')"
    done = python(code, XPATCH_BACKEND="native")
    assert done.stdout.strip() == "imported", done.stderr


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("XPATCH_BACKEND", "fast")
    with pytest.raises(BackendError, match="auto, native, reference; found 'fast'"):
        patch_ffn(*draw(), "relu")


def test_other_dtypes_take_the_reference():
    assert native.backend_for("cpu", torch.float64) == "reference"
    assert native.backend_for("cpu", torch.float32) == "native"
    assert native.backend_for("cuda", torch.float32) == "reference"


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.setenv("XPATCH_BACKEND", "native")
    monkeypatch.setattr(native, "load", lambda: type("Build", (), {"info": staticmethod(lambda: {"cuda": False})}))
    with pytest.raises(BackendError, match="no CUDA kernels"):
        native.backend_for("cuda", torch.float32)


def test_unknown_isa_is_named():
    done = python("from xpatch.ops import native; print(native.info()['error'])", XPATCH_ISA="mmx")
    assert "XPATCH_ISA must be portable, avx2 or avx512, found 'mmx'" in done.stdout, done.stderr


@pytest.mark.parametrize("isa", native.info().get("isas_built", []))
def test_every_isa_matches_float64(isa):
    code = """
import torch
from xpatch.ops import native, patch_ffn, reference
worst = 0.0
for activation in reference.ACTIVATIONS:
    for M, D, N, V in [(1, 1, 1, 1), (5, 19, 37, 70), (40, 64, 50, 33)]:
        for dtype, limit in [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)]:
            t = [torch.randn(s).to(dtype) for s in ((M, D), (N, D), (N,), (N, V))]
            t[1] /= D**0.5
            expected = reference.patch_ffn(*(a.double() for a in t), activation)
            difference = (patch_ffn(*t, activation).double() - expected).abs().max() / (1 + expected.abs().max())
            worst = max(worst, float(difference) / limit)
print(native.info()["isa"], worst < 1, worst)
"""
    done = python(code, XPATCH_ISA=isa, XPATCH_BACKEND="native")
    used, good, _ = done.stdout.split()
    assert good == "True", done.stdout + done.stderr
    if used != isa:
        pytest.skip(f"this machine has no {isa}")


def test_native_checks_codes_sizes_and_pointers():
    module = native.load()
    good = dict(zip("x keys bias values out fired M D N V xs ks vs dtype act threads".split(), [0] * 16, strict=True))
    good["threads"] = 1
    module.patch_ffn_cpu(*good.values())
    for name, value, words in [
        ("dtype", 3, "dtype code 3"),
        ("act", 5, "activation code 5"),
        ("act", -1, "activation code -1"),
        ("M", -1, "must not be negative"),
        ("threads", 0, "threads must be at least 1"),
    ]:
        with pytest.raises(module.NativeError, match=words):
            module.patch_ffn_cpu(*{**good, name: value}.values())
    with pytest.raises(module.NativeError, match="x is a null pointer"):
        module.patch_ffn_cpu(*{**good, "M": 1, "D": 4, "xs": 4}.values())
    with pytest.raises(module.NativeError, match="x row stride must be at least D=4, found 3"):
        module.patch_ffn_cpu(*{**good, "M": 2, "D": 4, "xs": 3}.values())


def test_many_python_threads_at_once():
    tensors = draw(rows=4000)
    expected = patch_ffn(*tensors, "relu")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: patch_ffn(*tensors, "relu"), range(64)):
            assert torch.equal(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_works_in_a_forked_child():
    code = """
import os, torch
from xpatch.ops import patch_ffn
torch.set_num_threads(4)
t = [torch.randn(s) for s in ((4000, 8), (50, 8), (50,), (50, 8))]
expected = patch_ffn(*t, "relu")
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(patch_ffn(*t, "relu"), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = python(code)
    assert done.stdout.strip() == "0", done.stdout + done.stderr
