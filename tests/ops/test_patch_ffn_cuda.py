"""The CUDA kernels through torch, and what of their binding can be seen without a GPU."""

from __future__ import annotations

import pytest
import torch

from xpatch.ops import ACTIVATIONS, native, patch_ffn, patch_ffn_capacity, reference
from xpatch.ops.registry.on_cuda import patch_ffn_on_cuda

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
needs_build = pytest.mark.skipif(not native.info().get("cuda"), reason="this native build has no CUDA kernels")


@pytest.fixture
def use_native(monkeypatch):
    monkeypatch.setenv("XPATCH_BACKEND", "native")
    native.reset()
    yield
    monkeypatch.undo()
    native.reset()


def draw(M, D, N, V, dtype=torch.float32, device="cuda", middle=0.0):
    shapes = ((M, D), (N, D), (N,), (N, V))
    x, keys, bias, values = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return tuple(t.to(device, dtype) for t in (x, keys / max(D, 1) ** 0.5, bias + middle, values))


def assert_close(found, tensors, activation):
    x, keys, bias, values = (t.double() for t in tensors)
    expected = reference.patch_ffn(x, keys, bias, values, activation)
    scores = reference.activate(torch.nn.functional.linear(x, keys, bias), activation)
    scale = (1 + scores.abs() @ values.abs()) * (1 + x.shape[-1] ** 0.5)
    assert ((found.double() - expected).abs() <= TOLERANCE[tensors[0].dtype] * scale).all()


@needs_gpu
@needs_build
@pytest.mark.usefixtures("use_native")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("M", [0, 1, 3, 8, 17, 64, 300])
def test_matches_float64(M, activation, dtype):
    for D, N, V, middle in ((64, 1000, 64, -2.0), (7, 33, 5, 0.0), (768, 5000, 768, -3.0)):
        tensors = draw(M, D, N, V, dtype, middle=middle)
        found = patch_ffn(*tensors, activation)
        assert_close(found, tensors, activation)
        assert torch.equal(found, patch_ffn(*tensors, activation))


@needs_gpu
@needs_build
@pytest.mark.usefixtures("use_native")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_captured_graph_follows_the_live_count(dtype):
    x, keys, bias, values = draw(5, 32, 80, 32, dtype)
    keys, bias, values = (t.reshape(2, 40, *t.shape[1:]) for t in (keys, bias, values))
    live, epoch = torch.tensor([10, 40], device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    y = torch.randn(5, 32, device="cuda").to(torch.bfloat16)

    def run():
        return patch_ffn_capacity(x, keys, bias, values, live, epoch, "relu", y)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for half, count in ((0, 10), (0, 0), (1, 40), (1, 7), (0, 3)):
        epoch.fill_(half)
        live[half] = count
        graph.replay()
        expected = reference.patch_ffn(x.double(), *(t[half, :count].double() for t in (keys, bias, values)), "relu")
        torch.testing.assert_close(out.double(), y.double() + expected, atol=0.2, rtol=2e-2)


@pytest.fixture
def seen(monkeypatch):
    """Calls of the native functions, by name and argument, as the stub file names them; nothing runs."""
    import ast
    from pathlib import Path

    import xpatch

    stub = ast.parse((Path(xpatch.__file__).parent / "_native.pyi").read_text(encoding="utf-8"))
    names = {
        node.name: [argument.arg for argument in node.args.posonlyargs]
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    calls = []

    class Build:
        NativeError = ValueError

        def __getattr__(self, name):
            def call(*arguments):
                calls.append((name, dict(zip(names[name], arguments, strict=True))))
                return 640 if name.endswith("workspace") else None

            return call

    build = Build()
    monkeypatch.setattr(native, "load", lambda: build)
    monkeypatch.setattr(
        "xpatch.ops.registry.on_cuda.call_native", lambda name, device, *a: getattr(build, name + "_cuda")(*a, 99)
    )
    return calls


def test_what_the_kernel_is_told(seen):
    x, keys, bias, values = draw(6, 4, 5, 3, torch.bfloat16, "cpu")
    masks = (torch.ones(2, 4).bfloat16(), torch.ones(2, 3).bfloat16(), torch.tensor([0, 1]))
    y = torch.randn(2, 3, 7)[..., 2:5]
    out = patch_ffn_on_cuda(x.view(2, 3, 4), keys, bias, values, "silu", masks, y=y)
    assert out.shape == (2, 3, 3) and out.dtype == torch.float32
    (_, asked), (_, told) = seen
    sizes = {"M": 6, "D": 4, "N": 5, "V": 3}
    assert asked == {**sizes, "dtype": 2, "mask_inner": True}
    assert {name: told[name] for name in sizes} == sizes
    assert (told["x"], told["keys"], told["values"]) == (x.data_ptr(), keys.data_ptr(), values.data_ptr())
    assert (told["x_stride"], told["keys_stride"], told["values_stride"], told["L"]) == (4, 4, 3, 2)
    assert (told["dtype"], told["activation"], told["y_dtype"], told["workspace_bytes"]) == (2, 3, 0, 640)
    assert told["out"] == out.data_ptr() and told["y"] and told["language"] and told["y_stride"] == 7
    assert (told["epoch"], told["live"], told["stream"]) == (0, 0, 99)


def test_what_the_kernel_is_told_about_halves(seen):
    x = torch.randn(3, 4)
    keys, bias, values = torch.randn(2, 8, 4), torch.randn(2, 8), torch.randn(2, 8, 5)
    live, epoch = torch.tensor([3, 2]), torch.tensor([1])
    out = patch_ffn_on_cuda(x, keys, bias, values, "relu", live=live, epoch=epoch)
    told = seen[1][1]
    assert out.shape == (3, 5) and (told["N"], told["V"], told["keys_stride"], told["values_stride"]) == (8, 5, 4, 5)
    assert (told["live"], told["epoch"], told["y"], told["mask_inner"]) == (live.data_ptr(), epoch.data_ptr(), 0, 0)
    assert told["keys"] == keys.data_ptr() and told["bias"] == bias.data_ptr()


@needs_build
def test_the_binding_checks_before_it_launches():
    module = native.load()
    names = (
        "x keys bias values out mask_inner mask_outer language M D N V L x_stride keys_stride values_stride dtype activation "
        "y y_stride y_dtype epoch live workspace workspace_bytes stream"
    ).split()
    nothing = dict.fromkeys(names, 0)
    module.patch_ffn_cuda(*nothing.values())
    one = {**nothing, **dict.fromkeys("x keys bias values out".split(), 64), **dict.fromkeys("MDNV", 1)}
    needed = module.patch_ffn_cuda_workspace(1, 1, 1, 1, 0, False)
    for change, words in (
        ({"dtype": 3}, "dtype code 3"),
        ({"activation": 9}, "activation code 9"),
        ({"y_dtype": -1}, "dtype code -1"),
        ({"M": -1}, "must not be negative"),
        ({"live": 64}, "epoch and live come together"),
        ({"mask_outer": 64}, "language is a null pointer"),
        ({"workspace_bytes": needed - 1, "workspace": 256}, f"workspace of {needed} bytes, found {needed - 1}"),
        ({"workspace_bytes": needed, "workspace": 8}, "aligned to 16"),
        ({"M": 2, "x_stride": 1, "y": 64}, "y row stride must be at least V=1, found 0"),
    ):
        with pytest.raises(module.NativeError, match=words):
            module.patch_ffn_cuda(*{**one, **change}.values())


@needs_build
def test_the_workspace_stays_small():
    """At most 256 rows by 65 536 neurons are held at once, whatever the sizes."""
    size = native.load().patch_ffn_cuda_workspace
    assert size(0, 8, 8, 8, 0, False) == 0
    assert size(1, 4096, 50_000, 4096, 2, False) < 2 * 2**20
    assert size(64, 4096, 50_000, 4096, 2, False) < 24 * 2**20
    assert size(1024, 4096, 1_000_000, 4096, 2, True) == size(100_000, 4096, 10_000_000, 4096, 2, True) < 96 * 2**20
