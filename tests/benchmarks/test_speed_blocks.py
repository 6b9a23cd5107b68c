"""The README's tables of speed say what the result files say, missed goals too."""

from __future__ import annotations

import pytest

from xpatch.benchmarks import goals, kernel, machine, model_latency, model_shapes, readme, speed_blocks

BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.fixture
def results(drawn_cases, tmp_path, monkeypatch):
    """A folder of result files as the commands write them, of few and small patches."""
    quick = {"cases": drawn_cases, "repeats": 15, "progress": False, "work": tmp_path / "work"}
    kernel.run(tmp_path / "kernel.json", n=(40, 5_000), m=(1, 8), patches=("default", "paper"), width=16, **quick)
    kernel.run(tmp_path / "kernel_stretch.json", stretch=True, n=(40, 400), m=(1,), width=16, **quick)
    one = model_shapes.subject("bert-base", **BERT)
    model_latency.run(tmp_path / "latency.json", models=[one], patches=4598, batches=(1,), tokens=(6,), **quick)
    return tmp_path


def test_the_block_has_every_table(results):
    text = readme.block(results)
    assert "| default | 5,000 |" in text and "| paper | 40 |" in text and "400 patches cost one row" in text
    assert "![What patches cost, against their number](benchmarks/results/kernel_stretch.svg)" in text
    assert "| bert-base | 1 | 6 | 4,598 |" in text and "Logits differ" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):  # every row of a table has the cells of its head
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_without_results_nothing_is_said(tmp_path):
    assert "patch_ffn" not in readme.block(tmp_path) and "unpatched" not in readme.block(tmp_path)


def test_a_missed_goal_is_called_missed():
    rows = [{"n": 1, "m": 2, "speedup": 3.0}, {"n": 4, "m": 5, "speedup": 11.0}, {"n": 6, "m": 7, "speedup": None}]
    found = goals.worst("times dense", rows, "speedup", ("n", "m"), at_least=10)
    assert found == [{"what": "times dense", "at_least": 10, "found": 3.0, "met": False, "where": {"n": 1, "m": 2}}]
    assert "| times dense | ≥ 10 | 3 | N=1, M=2 | **missed** |" in speed_blocks.goal_table(found)
    reached = goals.worst("of a read", rows, "speedup", ("n",), at_most=11)
    assert "| of a read | ≤ 11 | 11 | N=4 | met |" in speed_blocks.goal_table(reached)
    assert goals.worst("never measured", rows[2:], "speedup", ("n",), at_least=1) == []
    assert goals.table(found).row_count == 1 and speed_blocks.goal_table([]) == ""


def test_only_the_kernels_own_rows_count(results):
    result = readme._read(results / "kernel.json")
    odd = {**result["rows"][0], "dtype": "bf16", "speedup": 0.01}
    assert kernel.goals({**result, "rows": [*result["rows"], odd]}) == kernel.goals(result)
    assert machine.native_build() is None or len(machine.native_build()) == 16
