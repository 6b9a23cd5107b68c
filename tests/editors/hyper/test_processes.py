"""Two processes share a step's edits and end with the network one process ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xpatch.editors.hyper.folder import TRAINING, read_tensors

pytest.importorskip("accelerate")
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import xpatch
from tests.editors.conftest import model_of, tokenizer_of
from tests.editors.hyper.conftest import SMALL, facts
xpatch.train_editor(model_of("bert"), tokenizer_of("bert"), facts(), "mend", out=sys.argv[1], progress=False, **SMALL["mend"])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    for words, name in (([sys.executable], "one"), (launch, "two")):
        done = subprocess.run(
            [*words, str(script), str(tmp_path / name)], cwd=root, env=environment, capture_output=True, text=True, timeout=600
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (one, first), (two, second) = (read_tensors(tmp_path / name / TRAINING) for name in ("one", "two"))
    assert first["step"] == second["step"] == 6 and list(one) == list(two)
    for name in one:
        assert torch.allclose(one[name].double(), two[name].double(), atol=1e-4, rtol=1e-3), name
