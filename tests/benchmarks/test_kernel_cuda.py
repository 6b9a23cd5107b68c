"""The GPU benchmark: what it says without a GPU, and its rows where there is one."""

from __future__ import annotations

import json
import os

import pytest
import torch

from xpatch.benchmarks import kernel_cuda
from xpatch.errors import BackendError
from xpatch.ops import native


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    before = os.environ.get("XPATCH_BACKEND")
    with pytest.raises(BackendError, match="expected a CUDA device that torch can use, found none"):
        kernel_cuda.main(["--json", str(tmp_path / "kernel_cuda.json")])
    assert not list(tmp_path.iterdir()) and os.environ.get("XPATCH_BACKEND") == before


def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="at least 15 repeats, found 3"):
        kernel_cuda.run(repeats=3)


@pytest.mark.skipif(not (torch.cuda.is_available() and native.info().get("cuda")), reason="no GPU, or no CUDA kernels")
def test_rows(tmp_path):
    file = tmp_path / "kernel_cuda.json"
    kernel_cuda.run(file, n=(500,), m=(1, 8), d=(64,), patches=("sparse", "adversarial"), repeats=15)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 12
    for row in rows:
        assert min(row["dense_ms"], row["kernel_ms"], row["copy_ms"]) > 0 and row["max_rel_err"] < 0.05
        assert (row["fires_share"] > 0.99) == (row["patches"] == "adversarial")
