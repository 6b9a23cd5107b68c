"""The swap benchmark from end to end on tiny models: every field, resuming, honesty of what it compares."""

from __future__ import annotations

import json
import threading

import pytest
import torch

import xpatch
from xpatch.benchmarks import imports, machine, parts, result_blocks, swap, swap_latency

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100,
    "max_position_embeddings": 40,
}  # fmt: skip
QUICK = {"restart": False, "swaps": 15, "reloads": 15, "threads": 2, **TINY}


def quick(out=None, **more):
    more = {"latency": QUICK, "patches": 5, "soak_swaps": 8, "crash_writes": 3, "fuzz_files": 5, **more}
    return swap.run(out, threads=2, progress=False, command=["xpatch", "bench", "swap"], **more)


@pytest.mark.parametrize(
    "only", [("latency", "fuzz", "soak"), pytest.param(swap.PARTS, marks=pytest.mark.slow, id="all")], ids="-".join
)
def test_the_result_has_every_field(tmp_path, only):
    out = tmp_path / "swap.json"
    result = quick(out, only=only)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert {"machine", "versions", "seeds", "command", "date"} <= set(result["header"])
    assert result["header"]["command"] == "xpatch bench swap"
    assert result["ratio"] == round(result["reload_ms"] / result["swap_ms"], 1) > 0
    assert result["patches"] == 5 and result["idle"]["swap_ms"] > 0 and result["page_cache"] == "warm"
    assert {"threads", "swaps", "outputs", "torn", "rss_growth", "deadlocks", "seconds"} <= set(result["soak"])
    assert {"files", "crashed", "wrongly_accepted", "refused", "seconds"} <= set(result["fuzz"])
    assert result["soak"]["swaps"] == 8 and result["fuzz"]["files"] == 5
    if "crash" in only:
        assert {"kills", "writes", "lost", "torn", "seconds"} <= set(result["crash"])
        assert result["crash"]["writes"] == 3 and 0 < result["import_ratio"] <= result["import_in_use_ratio"]
    failed = {goal["what"] for goal in result["goals"] if not goal["met"]}
    assert not {what for what in failed if what.startswith(("crash", "fuzz"))} and "soak: torn" not in failed
    assert "5 patches" in result_blocks.swap_table(result)


def test_finished_parts_are_reused_until_something_changes(tmp_path, monkeypatch):
    out, made = tmp_path / "swap.json", []
    monkeypatch.setattr(swap_latency, "run", lambda **settings: made.append(settings) or {"swap_ms": 1.0 * len(made)})
    first = quick(out, only=("latency",))
    assert quick(out, only=("latency",))["swap_ms"] == first["swap_ms"] == 1.0 and len(made) == 1
    assert (tmp_path / "swap.work" / ".gitignore").read_text() == "*\n"
    assert quick(out, only=("latency",), patches=6)["swap_ms"] == 2.0
    assert quick(None, only=("latency",))["swap_ms"] == 3.0  # without a file nothing is kept, nor looked for
    monkeypatch.setattr(machine, "cpu_model", lambda: "another processor")
    assert quick(out, only=("latency",))["swap_ms"] == 4.0


def test_a_part_that_fails_leaves_the_finished_ones(tmp_path, monkeypatch):
    def broken_off(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(swap_latency, "run", lambda **settings: {"swap_ms": 1.0})
    monkeypatch.setattr(imports, "run", broken_off)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "swap.json", only=("latency", "imports"))
    assert not (tmp_path / "swap.json").exists()
    assert [path.suffix for path in (tmp_path / "swap.work").glob("latency-*")] == [".json"]


def test_the_code_decides_what_is_reused(tmp_path, monkeypatch):
    from pathlib import Path

    before = parts.key({"x": 1}, ("soak",))
    assert parts.key({"x": 1}, ("soak",)) == before
    assert len({before, parts.key({"x": 2}, ("soak",)), parts.key({"x": 1}, ("imports",))}) == 3
    read = Path.read_bytes
    changed = b"\n__changed__ = True\n"
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + (changed if path.name == "soak_models.py" else b"")
    )
    assert parts.key({"x": 1}, ("soak",)) != before


def test_latency_swaps_two_sets_on_one_live_model():
    """The sets are checked against the base, differ, and the model goes on answering while they change."""
    found = swap_latency.run(7, **{**QUICK, "threads": 1})
    assert found["patches"] == 7 and found["repeats"] == {"swap": 15, "reload": 15}
    for field in (
        "swap_ms",
        "swap_hot_ms",
        "load_and_swap_ms",
        "reload_ms",
        "reload_answer_ms",
        "answer_ms",
        "first_apply_ms",
    ):
        assert found[field] > 0, field
        assert field == "first_apply_ms" or found["idle"][field] > 0
    assert "restart_ms" not in found
    assert set(found["iqr_ms"]) == {"idle", "load", "fresh process"}
    assert not [thread for thread in threading.enumerate() if "infer" in thread.name]


def test_a_swap_that_changes_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(xpatch, "apply", lambda model, *args, **kwargs: model)
    with pytest.raises(xpatch.BackendError, match="another answer after each apply"):
        swap_latency.run(3, **QUICK)


def test_a_failing_inference_thread_is_raised(monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, input_ids):
            raise RuntimeError("no answer")

    with pytest.raises((RuntimeError, threading.BrokenBarrierError)), swap_latency._load(Broken(), torch.ones(1), 2):
        pass


def test_fresh_processes_are_timed_in_turn():
    found = imports.fresh({"nothing": "pass", "longer": "import time; time.sleep(0.1)"}, 15)
    assert found["longer"]["p50_ms"] > found["nothing"]["p50_ms"] + 90
    with pytest.raises(xpatch.BackendError, match="ModuleNotFoundError"):
        imports.fresh({"broken": "import there_is_no_such_module"}, 15)
    with pytest.raises(ValueError, match="at least 15"):
        imports.fresh({"nothing": "pass"}, 3)


@pytest.mark.slow
def test_import_takes_little_more_than_torch():
    found = imports.run(progress=False)
    assert found["import_ratio"] <= 1.15 and found["import_ratio"] <= found["import_in_use_ratio"]
    assert found["imports"]["repeats"] >= 15


def test_goals_compare_with_what_was_found():
    soak = {"torn": 0, "stale": 0, "errors": 0, "deadlocks": 1, "rss_growth": 2.5}
    result = {"ratio": 1200.0, "import_ratio": 1.2, "soak": soak, "crash": {"lost": 0, "torn": 0}}
    met = {goal["what"]: goal["met"] for goal in swap.goals(result)}
    assert [what for what, reached in met.items() if not reached] == [
        "import xpatch over import torch",
        "soak: deadlocks",
        "soak: growth of the memory, %",
    ]
    assert swap.goals({}) == []
    shown = swap.table({**result, "swap_ms": 0.5, "goals": swap.goals(result)})
    assert shown.row_count == 1 + len(met)


def test_unknown_part():
    with pytest.raises(xpatch.FormatError, match="no part speed"):
        swap.run(only=("speed",))
