"""The margin study on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

import xpatch
from xpatch.benchmarks import margin
from xpatch.patches.identity import identify


@pytest.mark.usefixtures("quick")
def test_both_stages_are_measured(model, tokenizer, protocol, tmp_path):
    result = margin.run(
        tmp_path / "m.json", margins=(1.0, 6.0), seeds={"choose": (0, 1), "report": (0,)}, sentences=24, model=model,
        tokenizer=tokenizer, protocols={"choose": protocol, "report": protocol}, progress=False, keep_failed=True,
    )  # fmt: skip
    assert json.loads((tmp_path / "m.json").read_text())["points"] == json.loads(json.dumps(result["points"]))
    assert [(p["stage"], p["margin"]) for p in result["points"]] == [
        ("choose", 1.0), ("choose", 6.0), ("report", 1.0), ("report", 6.0),
    ]  # fmt: skip
    for point in result["points"]:
        assert 0 <= point["fires"] <= point["survives"] <= 100
        low, high = point["z"]["0.01"], point["z"]["0.99"]
        assert low <= high
    assert margin.table(result).count("\n| choose |") == 2


def test_screen_counts_pairs(model):
    width = 32
    part = xpatch.PatchNeurons(
        "bert.encoder.layer.1",
        torch.eye(4, width),
        torch.tensor([1.0, -0.005, -0.5, -0.5]),
        torch.ones(4, width),
        "relu",
    )
    patches = xpatch.PatchSet(parts={"part": part}, base=identify(model, site=part.site))
    x = torch.zeros(2, width)
    x[:, 8] = 1.0  # no key looks there: scores are the biases, the bound is 0.01
    found = margin.screen(patches, x)
    assert found["fires"] == 25.0
    assert found["survives"] == 50.0
    assert found["key_norm"] == pytest.approx(1.0)
