"""What the tests of the operators share: the backends this machine can run, and memory layouts."""

from __future__ import annotations

import pytest
import torch

from xpatch.ops import native

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "native" and not native.available():
        pytest.fail(f"the native build is missing: {native.info()['error']}")
    monkeypatch.setenv("XPATCH_BACKEND", request.param)
    native.reset()
    yield request.param
    monkeypatch.undo()
    native.reset()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def laid_out():
    """`laid_out(kind, rows, width, dtype)`: a random matrix in memory of that kind."""

    def make(kind, rows, width, dtype=torch.float32):
        if kind == "sliced":
            return torch.randn(rows, width + 5).to(dtype)[:, 2 : width + 2]
        if kind == "transposed":
            return torch.randn(width, rows).to(dtype).t()
        if kind == "misaligned":
            return torch.randn(rows * width + 1).to(dtype)[1:].view(rows, width)
        return torch.randn(1, width).to(dtype).expand(rows, width)

    return make
