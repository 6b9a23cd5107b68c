"""Bases in other languages go on from the bundled verifier and are made once."""

from __future__ import annotations

import json

import pytest
import torch

from xpatch import zoo
from xpatch.benchmarks import bases


@pytest.mark.slow
def test_a_base_is_trained_kept_and_found_again(tmp_path):
    state = torch.random.get_rng_state()
    told = []
    path = bases.make(tmp_path, "zh", steps=2, tell=told.append)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert json.loads(told[-1])["step"] == 2 and set(json.loads((path / "accuracy.json").read_text())) >= {"en", "zh"}
    assert (tmp_path / ".gitignore").read_text() == "*\n" and not (tmp_path / "zh.tmp").exists()
    made, tokenizer = bases.load(path)
    bundled, _ = zoo.load("verifier")
    changed = {k for k, v in made.state_dict().items() if not torch.equal(v, bundled.state_dict()[k])}
    assert changed and not any("embeddings" in name for name in changed) and not made.training
    assert bases.make(tmp_path, "zh", steps=1_000_000) == path  # there already
    assert tokenizer("x")["input_ids"]
