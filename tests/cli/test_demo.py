"""The demo: its pieces on a tiny model, and the whole story on the bundled verifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xpatch.demo import serving
from xpatch.demo.answers import ask, comparison, most_wrong, wrong_languages
from xpatch.demo.undo import Witness
from xpatch.patches.requests import read_requests

METHODS = {"original", "ft", "t-patcher", "mpn-only", "mpn"}
FIELDS = {
    "name", "patches", "reliability", "mlg", "clg", "clg_avg", "clg_needed", "clg_unseen", "locality_train", "locality_test",
    "unchanged", "edits", "edits_per_s",
}  # fmt: skip


@pytest.fixture
def loaded(model_folder: Path) -> tuple[Any, Any]:
    from xpatch.cli.inputs import load_classifier

    return load_classifier(str(model_folder))


def test_answers(loaded: tuple[Any, Any], requests_file: Path) -> None:
    from rich.console import Console

    requests = read_requests(requests_file)
    answers = ask(*loaded, requests)
    assert list(answers["1"]) == ["en", "de", "fr"]
    assert "en" in wrong_languages(requests[0], answers["1"])
    assert most_wrong(requests, answers, 1)[0].id in ("1", "2")
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comparison("claims", requests, [("answer", answers)]))
    assert "✗ SUPPORTS" in capture.get()


def test_witness_sees_one_changed_bit(loaded: tuple[Any, Any], requests_file: Path) -> None:
    model, tokenizer = loaded
    witness = Witness(model, tokenizer, read_requests(requests_file))
    assert witness.restored()
    weight = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        weight.view(torch.int32)[-1, -1] ^= 1
    assert not witness.restored()


def test_latency_without_onnx(loaded: tuple[Any, Any], patch_folder: Path) -> None:
    import xpatch

    model, tokenizer = loaded
    found = serving.latency(model, tokenizer, xpatch.load(patch_folder), "The capital of France is Berlin.", None)
    assert list(found) == ["PyTorch, unpatched", "PyTorch, patched"]
    assert xpatch.status(model).names == ()


@pytest.mark.slow
@pytest.mark.parametrize("onnx", [True, False], ids=["with-onnx", "without-onnx"])
def test_demo(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx: bool) -> None:
    if not onnx:
        monkeypatch.setattr(serving, "onnx_missing", lambda: "onnxruntime")
    out = tmp_path / "demo-out"
    result = run("demo", "--out", out, "--json", out / "demo.json", "--edits", 24)
    assert result.code == 0, result.err
    for word in ("wrong", "✗", "✓", "Transformer-Patcher", "published", "off"):
        assert word in result.out
    found = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert {row["method"] for row in found["methods"]} == METHODS
    for row in found["methods"]:
        assert set(row) >= FIELDS
        assert row["paper"]
    assert found["restored_bit_exact"] is True
    assert found["switched_off_one"] is True
    assert found["seed"] == 0
    assert (out / "fixes" / "patch_config.json").is_file()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("https://arxiv.org", "")
    if onnx:
        assert found["onnx_max_diff"] < 1e-4
        assert found["onnx_changed_predictions"] == 0
        assert len(found["latency"]) == 4
        assert (out / "onnx" / "model.onnx").is_file()
        assert (out / "fixes.onnx_adapter").is_file()
    else:
        assert found["onnx_max_diff"] is None
        assert len(found["latency"]) == 2
        assert "xpatch[onnx]" in result.out


def test_demo_refuses_a_bad_place(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for words in (
        ("--out", tmp_path / "file"),
        ("--out", tmp_path / "file" / "x"),
        ("--json", tmp_path, "--out", tmp_path / "x"),
    ):
        result = run("demo", *words)
        assert result.code == 2, result
        assert not (tmp_path / "x").exists()
