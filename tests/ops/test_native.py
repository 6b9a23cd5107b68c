"""Choosing the backend, what happens when the native build is not there, and the kernel on every instruction set."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from xpatch.errors import BackendError
from xpatch.ops import native, pack_keys, patch_ffn, patch_ffn_fired, reference

BLOCK_NATIVE = "import sys; sys.modules['xpatch._native'] = None\n"
ISAS = native.info().get("isas_built", [])


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


@functools.cache
def this_machine_has(isa):
    return python("from xpatch.ops import native; print(native.info()['isa'])", XPATCH_ISA=isa).stdout.strip() == isa


def test_info_of_this_build():
    facts = native.info()
    assert facts["available"] and facts["error"] is None
    assert facts["isa"] in facts["isas_built"] and "portable" in facts["isas_built"]
    assert isinstance(facts["cuda"], bool)
    assert facts["threads"] == torch.get_num_threads()


def test_missing_build_falls_back_with_one_warning(no_native):
    tensors = draw()
    with pytest.warns(RuntimeWarning, match="xpatch doctor"):
        assert pack_keys(*tensors[1:3], "relu") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(patch_ffn(*tensors, "relu"), reference.patch_ffn(*tensors, "relu"))


def test_keys_that_were_packed_before_the_build_went_missing(no_native):
    tensors, packed = draw(), torch.zeros(64, dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="xpatch doctor"):
        found = patch_ffn(*tensors, "relu", packed)
    assert torch.equal(found, reference.patch_ffn(*tensors, "relu"))


def test_missing_build_raises_on_first_use_when_asked_for(no_native, monkeypatch):
    monkeypatch.setenv("XPATCH_BACKEND", "native")
    tensors, packed = draw(), torch.zeros(64, dtype=torch.uint8)
    for use in (lambda: pack_keys(*tensors[1:3], "relu"), lambda: patch_ffn(*tensors, "relu", packed)):
        with pytest.raises(BackendError) as caught:
            use()
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
        pack_keys(*draw()[1:3], "relu")


def test_other_dtypes_take_the_reference():
    assert native.backend_for("cpu", torch.float64) == "reference"
    assert native.backend_for("cpu", torch.float32) == "native"
    tensors = [t.double() for t in draw()]
    assert pack_keys(*tensors[1:3], "relu") is None
    packed = torch.zeros(64, dtype=torch.uint8)
    assert torch.equal(patch_ffn(*tensors, "relu", packed), reference.patch_ffn(*tensors, "relu"))


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.setenv("XPATCH_BACKEND", "native")
    monkeypatch.setattr(native, "load", lambda: type("Build", (), {"info": staticmethod(lambda: {"cuda": False})}))
    with pytest.raises(BackendError, match="no CUDA kernels"):
        native.backend_for("cuda", torch.float32)


def test_unknown_isa_is_named():
    done = python("from xpatch.ops import native; print(native.info()['error'])", XPATCH_ISA="mmx")
    expected = "XPATCH_ISA must be one of portable, dotprod, avx2, avx2vnni, avx512, avx512vnni; found 'mmx'"
    assert expected in done.stdout, done.stderr


def test_isas_are_named_weakest_first():
    order = ["portable", "dotprod", "avx2", "avx2vnni", "avx512", "avx512vnni"]
    assert [isa for isa in order if isa in ISAS] == ISAS


EVERY_ISA = """
import math, torch
from xpatch.ops import native, pack_keys, reference
from xpatch.ops.registry.patch_ffn import native_call
torch.manual_seed(0)
worst, kept = 0.0, []
for activation in ("relu", "gelu", "gelu_tanh", "silu"):
    for M, D, N, V in [(1, 1, 1, 1), (5, 19, 37, 70), (40, 64, 50, 33), (13, 300, 120, 20)]:
        for dtype, limit in [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)]:
            x, keys, bias, values = t = [torch.randn(s).to(dtype) for s in ((M, D), (N, D), (N,), (N, V))]
            keys /= D**0.5
            bias -= 2
            found, result = native_call(*t, activation, pack_keys(keys, bias, activation), always=True)
            whole, _ = native_call(*t, activation, pack_keys(keys, bias * math.inf, activation), always=True)
            assert torch.equal(found, whole), (activation, M, D, N, V, dtype)
            expected = reference.patch_ffn(*(a.double() for a in t), activation)
            difference = (found.double() - expected).abs().max() / (1 + expected.abs().max())
            worst = max(worst, float(difference) / limit)
            kept.append(result[2])
print(native.info()["isa"], worst, sum(kept))
"""


@functools.cache
def on_isa(isa):
    done = python(EVERY_ISA, XPATCH_ISA=isa, XPATCH_BACKEND="native")
    assert done.returncode == 0, done.stdout + done.stderr
    used, worst, kept = done.stdout.split()
    return used, float(worst), int(kept)


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_matches_float64_and_itself_unscreened(isa):
    used, worst, kept = on_isa(isa)
    assert worst < 1
    assert abs(kept - on_isa("portable")[2]) <= 3  # the same bytes; the last bits of a bound may differ
    if used != isa:
        pytest.skip(f"this machine has no {isa}")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_the_screening_tests_on_every_isa(isa):
    if not this_machine_has(isa):
        pytest.skip(f"this machine has no {isa}")
    files = [Path(__file__).with_name(f"test_{name}.py") for name in ("screening", "cut_offs", "packing", "patch_ffn")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "XPATCH_ISA": isa}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


NAMES = (
    "x keys bias values out mask_inner mask_outer language M D N V L x_stride keys_stride values_stride dtype activation "
    "packed packed_bytes always want_fired threads"
).split()


def test_native_checks_codes_sizes_and_pointers():
    module = native.load()
    tensors, out = draw(), torch.empty(3, 2)
    packed = pack_keys(*tensors[1:3], "relu")
    good = dict.fromkeys(NAMES, 0) | dict(zip(NAMES, [t.data_ptr() for t in (*tensors, out)], strict=False))
    good |= {"M": 3, "D": 4, "N": 5, "V": 2, "x_stride": 4, "keys_stride": 4, "values_stride": 2, "threads": 1}
    good |= {"packed": packed.data_ptr(), "packed_bytes": packed.numel(), "always": True, "want_fired": False}
    too_many, pairs, survivors, fired, coarse = module.patch_ffn_cpu(*good.values())
    assert (too_many, pairs, fired, coarse) == (False, 15, b"", False) and 0 <= survivors <= 15
    torch.testing.assert_close(out, reference.patch_ffn(*tensors, "relu"))
    for name, value, words in [
        ("dtype", 3, "dtype code 3"),
        ("activation", 5, "activation code 5"),
        ("activation", -1, "activation code -1"),
        ("activation", 1, "expected N=5 D=4 activation code 1; found N=5 D=4 activation code 0"),
        ("M", -1, "must not be negative"),
        ("N", 4, "expected N=4 D=4"),
        ("D", 3, "expected N=5 D=3"),
        ("threads", 0, "threads must be at least 1"),
        ("x", 0, "x is a null pointer"),
        ("keys", 0, "keys is a null pointer"),
        ("bias", 0, "bias is a null pointer"),
        ("values", 0, "values is a null pointer"),
        ("out", 0, "out is a null pointer"),
        ("mask_inner", 8, "language is a null pointer beside masks"),
        ("packed", 0, "expected at least 64 bytes"),
        ("packed_bytes", 63, "expected at least 64 bytes, found 63"),
        ("packed_bytes", packed.numel() - 1, f"expected {packed.numel()} bytes, found {packed.numel() - 1}"),
        ("x_stride", 3, "x row stride must be at least D=4, found 3"),
        ("keys_stride", 3, "keys row stride must be at least D=4, found 3"),
        ("values_stride", 1, "values row stride must be at least V=2, found 1"),
    ]:
        with pytest.raises(module.NativeError, match=words):
            module.patch_ffn_cpu(*{**good, name: value}.values())
    language = torch.tensor([0, 2, 1])
    masked = {**good, "mask_inner": torch.ones(2, 4).data_ptr(), "language": language.data_ptr(), "L": 2}
    with pytest.raises(module.NativeError, match=r"language of row 1 must be in \[0, 2\), found 2"):
        module.patch_ffn_cpu(*masked.values())
    with pytest.raises(module.NativeError, match="sizes must not be negative"):
        module.packed_bytes(-1, 4, 0)


def screened_draw(rows):
    x, keys, bias, values = torch.randn(rows, 40), torch.randn(300, 40), torch.randn(300) - 15, torch.randn(300, 8)
    return (x, keys, bias, values, "relu", pack_keys(keys, bias, "relu"))


def test_many_python_threads_at_once():
    arguments = screened_draw(400)
    expected, pairs = patch_ffn_fired(*arguments)
    assert 0 < len(pairs) < 0.1 * 400 * 300
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found, fired in pool.map(lambda _: patch_ffn_fired(*arguments), range(64)):
            assert torch.equal(found, expected) and torch.equal(fired, pairs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_works_in_a_forked_child():
    """With packed keys, where no more than the kernel runs: torch's own matmuls may wait for ever for threads that a fork lost."""
    code = """
import os, torch
from xpatch.ops import pack_keys, patch_ffn
torch.set_num_threads(4)
x, keys, bias, values = torch.randn(4000, 40), torch.randn(300, 40), torch.randn(300) - 25, torch.randn(300, 8)
packed = pack_keys(keys, bias, "relu")
expected = patch_ffn(x, keys, bias, values, "relu", packed)
child = os.fork()
if child == 0:
    found = patch_ffn(x, keys, bias, values, "relu", packed)
    os._exit(0 if found.numpy().tobytes() == expected.numpy().tobytes() and expected.numpy().any() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = python(code)
    assert done.stdout.strip() == "0", done.stdout + done.stderr
