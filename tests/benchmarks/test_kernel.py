"""The kernel benchmark from end to end on few, small, drawn patches: every field, resuming, what counts as an error."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch

from xpatch import ops
from xpatch.benchmarks import kernel, kernel_point, machine
from xpatch.ops import native

FIELDS = {
    *("n", "m", "d", "dtype", "threads", "isa", "patches", "rows", "dense_ms", "dense_iqr_ms", "kernel_ms", "kernel_iqr_ms"),
    *("speedup", "floor_ms", "floor_iqr_ms", "floor_ratio", "floor_gb_s", "survivors_share", "fired_share", "max_rel_err"),
    *("dense_rel_err", "int8_peak_share", "repeats"),
}  # fmt: skip


@pytest.fixture
def quick(drawn_cases):
    def run(out=None, **more):
        settings = {
            "n": (50,),
            "m": (1, 8),
            "patches": ("default", "paper"),
            "threads": (1,),
            "width": 32,
            "repeats": 15,
        }
        return kernel.run(out, **{**settings, **more}, cases=drawn_cases, progress=False, command=["xpatch", "bench"])

    return run


def test_the_result_has_every_field(quick, tmp_path):
    out = tmp_path / "kernel.json"
    result = quick(out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert {"machine", "versions", "seeds", "command", "date"} <= set(result["header"])
    assert [(row["patches"], row["n"], row["m"]) for row in result["rows"]] == [
        ("default", 50, 1), ("default", 50, 8), ("paper", 50, 1), ("paper", 50, 8),
    ]  # fmt: skip
    for row in result["rows"]:
        assert set(row) >= FIELDS
        assert row["d"] == 32 and row["dtype"] == "fp32" and row["threads"] == 1 and row["isa"] == native.info()["isa"]
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["kernel_ms"], abs=1e-3)
        assert row["floor_ratio"] == pytest.approx(row["kernel_ms"] / row["floor_ms"], abs=1e-3)
        assert 0 < row["floor_gb_s"] and 0 <= row["max_rel_err"] < 1e-5 and row["repeats"] == 15
    assert [case["info"] for case in result["cases"]] == [{"positions": "read"}] * 2
    assert result["cases"][0]["histogram"]["shares"] == [0.99, 0.01]
    assert {"what", "found", "met", "where"} <= set(result["goals"][0])


def test_finished_rows_are_reused_until_something_changes(quick, tmp_path, monkeypatch):
    out, made = tmp_path / "kernel.json", []
    measure = kernel_point.point

    def counted(*args):
        made.append(args[1])
        return measure(*args)

    monkeypatch.setattr(kernel_point, "point", counted)
    first = quick(out)
    assert quick(out)["rows"] == first["rows"] and len(made) == 4
    assert len(quick(out, m=(1, 4))["rows"]) == 4 and len(made) == 6  # M=1 is kept
    monkeypatch.setattr(machine, "native_build", lambda: "another build")
    quick(out)
    assert len(made) == 10


def test_the_grids():
    cells = kernel.grid((), (), (), (2,), False, False)
    assert {(c.n, c.m) for c in cells if c.patches == "paper"} == {(n, m) for n in kernel.NEURONS for m in kernel.ROWS}
    assert {c.n for c in cells if c.patches in ("outlier", "adversarial")} == {5_000}
    assert {c.dtype for c in cells} == {"fp32", "bf16"} and {c.rows for c in cells} == {"read", "tokens"}
    assert len(set(cells)) == len(cells)
    stretch = kernel.grid((), (), (), (2,), False, True)
    assert {c.patches for c in stretch} == {"default"} and max(c.n for c in stretch) == 1_000_000
    chosen = kernel.grid((7,), (3,), ("outlier",), (1, 2), False, False)
    assert [(c.patches, c.n, c.m, c.threads) for c in chosen] == [("outlier", 7, 3, 1), ("outlier", 7, 3, 2)]
    # Sets lie side by side: making one of them again costs more than measuring it.
    order = [(c.patches, c.n, c.dtype, c.rows) for c in cells]
    assert len([key for key, before in zip(order[1:], order, strict=False) if key != before]) == len(set(order)) - 1


def test_other_dtypes_and_threads(quick, drawn_cases):
    torch.set_num_threads(2)
    result = quick(m=(4,), patches=("default",), threads=(1, 2))
    assert [row["threads"] for row in result["rows"]] == [1, 2] and torch.get_num_threads() == 2
    loaded = kernel_point.load(drawn_cases("default", 20, 8, 16, seed=0), torch.bfloat16)
    assert loaded.keys.dtype == loaded.x.dtype == torch.bfloat16
    assert kernel_point.point(loaded, 4, 15)["max_rel_err"] < 0.1


def test_the_reference_is_float64_of_the_given_patches(drawn_cases, monkeypatch):
    monkeypatch.setattr(kernel_point, "CHUNK", 7)
    case = drawn_cases("paper", 30, 12, 16, seed=3)
    loaded = kernel_point.load(case, torch.float32)
    exact, fired = kernel_point.reference(loaded.x, loaded)
    scores = case.x.double() @ case.keys.double().t() + case.bias.double()
    torch.testing.assert_close(exact, torch.nn.functional.gelu(scores) @ case.values.double())
    assert fired == pytest.approx(float((scores > 0).double().mean()))


def test_a_wrong_kernel_shows(quick, monkeypatch):
    right = ops.BoundPatchFfn.__call__
    monkeypatch.setattr(ops.BoundPatchFfn, "__call__", lambda self, x: right(self, x) + 0.1)
    result = quick(patches=("default",))
    assert (
        min(row["max_rel_err"] for row in result["rows"]) > 1e-3 > max(row["dense_rel_err"] for row in result["rows"])
    )
    assert not next(goal for goal in result["goals"] if "float64" in goal["what"])["met"]


def test_every_side_sees_the_same_rows(drawn_cases, monkeypatch):
    """Small calls walk over the rows, so that no single row decides; both sides walk alike."""
    seen = {"dense": [], "kernel": []}
    monkeypatch.setattr(
        kernel_point, "dense", lambda x, *rest: seen["dense"].append(x.data_ptr()) or torch.zeros_like(x)
    )
    monkeypatch.setattr(
        kernel_point, "kernel", lambda loaded: lambda x: seen["kernel"].append(x.data_ptr()) or torch.zeros_like(x)
    )
    kernel_point.point(kernel_point.load(drawn_cases("default", 20, 64, 16, seed=0), torch.float32), 8, 16)
    assert seen["dense"] == seen["kernel"] and len(set(seen["dense"])) == 8


def test_statistics_of_the_screening(drawn_cases, monkeypatch):
    loaded = kernel_point.load(drawn_cases("default", 2000, 64, 16, seed=0), torch.float32)
    found = kernel_point.point(loaded, 8, 15)
    assert found["fired_share"] <= found["survivors_share"] < 1 and found["dense_path"] in (False, True)
    every = kernel_point.load(drawn_cases("adversarial", 2000, 128, 16, seed=0), torch.float32)
    found = kernel_point.point(every, 128, 15)
    assert found["survivors_share"] == 1.0 and found["dense_path"] is True
    monkeypatch.setattr(ops, "pack_keys", lambda *args: None)
    found = kernel_point.point(kernel_point.load(drawn_cases("default", 20, 8, 16, seed=0), torch.float32), 8, 15)
    assert found["survivors_share"] is None and found["dense_path"] is None


def test_the_share_of_the_int8_peak(monkeypatch):
    class Build:
        @staticmethod
        def int8_peak(threads):
            return 1e12 * threads

    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "load", Build)
    assert kernel_point.int8_peak_share(256 * 1000 * 768, 1.0, 2) == round(256 * 1000 * 768 / 1e-3 / 2e12, 4)
    monkeypatch.setattr(native, "available", lambda: False)
    assert kernel_point.int8_peak_share(256 * 1000 * 768, 1.0, 2) is None


def test_the_stretch_draws_its_curves(quick, tmp_path):
    result = quick(tmp_path / "stretch.json", stretch=True, n=(10, 100, 1000), patches=())
    assert result["benchmark"] == "kernel-stretch" and {row["patches"] for row in result["rows"]} == {"default"}
    root = ElementTree.fromstring((tmp_path / "stretch.svg").read_text())
    assert len(root.findall(".//{*}polyline")) == 6  # three sides, two panels
    told = [title.text for title in root.findall(".//{*}title")]
    assert len(told) == 18 and any(text.startswith("xpatch, 1,000: ") and " ms (" in text for text in told)
    for shape in root.findall(".//{*}path"):
        x, y = map(float, shape.get("transform").removeprefix("translate(").rstrip(")").split())
        assert 0 <= x <= 880 and 0 <= y <= 440


def test_the_worst_point_decides_a_goal(quick):
    result = quick(n=(5_000,), m=(1, 32), patches=("default",), width=16)
    goal = next(goal for goal in result["goals"] if "M <= 32" in goal["what"])
    slowest = min(result["rows"], key=lambda row: row["speedup"])
    assert goal["found"] == slowest["speedup"] and goal["where"] == {"n": 5_000, "m": slowest["m"]}
    assert goal["met"] == (goal["found"] >= 10)
    assert not [goal for goal in result["goals"] if "paper" in goal["what"]]  # not measured: neither met nor missed
