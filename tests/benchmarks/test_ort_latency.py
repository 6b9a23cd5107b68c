"""The latency benchmark in ONNX Runtime on a tiny model: every side, the swap, the goals."""

from __future__ import annotations

import json

import pytest

import xpatch
from xpatch.benchmarks import model_shapes, ort_latency

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
TINY = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.5,
}  # fmt: skip


def test_the_result_has_every_field(drawn_cases, tmp_path):
    out = tmp_path / "ort.json"
    settings = {
        "patches": 40,
        "batches": (1, 3),
        "tokens": (6,),
        "repeats": 15,
        "cases": drawn_cases,
        "progress": False,
    }
    result = ort_latency.run(out, models=[model_shapes.subject("bert-base", **TINY)], **settings)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert [(row["batch"], row["tokens"]) for row in result["rows"]] == [(1, 6), (3, 6)]
    for row in result["rows"]:
        assert all(row[f"{side}_ms"] > 0 for side in ort_latency.SIDES) and row["swap_ms"] > 0
        assert row["ratio_full"] == pytest.approx(row["head_patched_ms"] / row["full_ms"], abs=1e-3)
        assert row["max_logit_diff"] < 1e-4 < row["moved"]  # the patches act, as in PyTorch
    assert result["goals"] == []  # they are for thousands of patches
    ort_latency.table(result)
    rows = [{**row, "patches": 4598} for row in result["rows"]]
    assert len(ort_latency.goals({"rows": rows})) == 5
    again = ort_latency.run(out, models=[model_shapes.subject("bert-base", **TINY)], **settings)
    assert again["rows"] == result["rows"]


def test_decoders_are_refused(drawn_cases):
    with pytest.raises(xpatch.XpatchError, match="gpt2 is a decoder"):
        ort_latency.run(models=["gpt2"], cases=drawn_cases, progress=False)
