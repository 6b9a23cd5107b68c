"""The cost of the counters on a tiny model: the form of the result, not its figures."""

from __future__ import annotations

import json

import pytest
import torch

from xpatch.benchmarks import firings


def test_points_and_table(tmp_path):
    torch.set_num_threads(1)
    path = tmp_path / "firings.json"
    result = firings.run(path, shapes=((2, 8),), counts=(20, 50), layers=2, width=64, repeats=15, progress=False)
    assert json.loads(path.read_text())["points"] == result["points"]
    assert [(p["batch"], p["tokens"], p["neurons"]) for p in result["points"]] == [(2, 8, 20), (2, 8, 50)]
    for point in result["points"]:
        assert point["off_p50_ms"] > 0 and point["noise_percent"] >= 0
        assert 0 < point["fired_percent"] <= 100
    assert firings.table(result).count("\n") == 3


def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="at least 15"):
        firings.run(shapes=((1, 4),), counts=(5,), layers=2, width=64, repeats=3, progress=False)
