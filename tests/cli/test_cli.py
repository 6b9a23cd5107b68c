"""The commands on tiny models: what they print and write, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMANDS = [
    ("demo",),
    ("edit",),
    ("train-editor",),
    ("inspect",),
    ("evaluate",),
    ("export", "base"),
    ("export", "adapter"),
    ("export", "quantized"),
    ("import",),
    ("export", "widened"),
    ("export", "merged"),
    ("export", "peft"),
    ("export", "verify"),
    ("bench", "crosslingual"),
    ("bench", "swap"),
    ("diff",),
    ("check",),
    ("sign",),
    ("store", "list"),
    ("store", "publish"),
    ("store", "rollback"),
    ("store", "history"),
    ("store", "diff"),
    ("store", "get"),
    ("store", "gc"),
    ("store", "verify"),
    ("doctor",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(run: Callable[..., Any], command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    assert f"Example: xpatch {' '.join(command)}" in result.out


def test_help_and_version(run: Callable[..., Any]) -> None:
    import xpatch

    assert "edit" in run("--help").out
    assert run("--version").out.strip() == xpatch.__version__


def test_edit_any_classifier(
    run: Callable[..., Any], any_model_folder: Path, requests_file: Path, memory_file: Path, tmp_path: Path
) -> None:
    """A saved BERT and a saved XLM-R: the edits take, in every language asked for, and the folder loads."""
    before = {path.name: path.read_bytes() for path in any_model_folder.iterdir()}
    out = tmp_path / "fixes"
    words = ("--model", any_model_folder, "--requests", requests_file, "--memory", memory_file, "--out", out, "--json")
    result = run("edit", *words)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert [edit["id"] for edit in found["edits"]] == ["1", "2"]
    assert {edit["status"] for edit in found["edits"]} <= {"edited", "already-right"}
    assert found["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "patch_config.json", "patch_model.safetensors"]
    assert {path.name: path.read_bytes() for path in any_model_folder.iterdir()} == before

    words = ("--model", any_model_folder, "--cases", requests_file, "--patches", out, "--json")
    result = run("evaluate", *words)
    assert result.code == 0, result.err
    assert json.loads(result.out)["metrics"]["reliability"]["value"] == 1.0


def test_edit_is_quiet_and_repeatable(
    run: Callable[..., Any],
    model_folder: Path,
    requests_file: Path,
    memory_file: Path,
    patch_folder: Path,
    tmp_path: Path,
) -> None:
    """The same seed writes the same tensors; --overwrite replaces a set; nothing but the result line is printed to a pipe."""
    tensors = (patch_folder / "patch_model.safetensors").read_bytes()
    words = (
        "edit",
        "--model",
        model_folder,
        "--requests",
        requests_file,
        "--memory",
        memory_file,
        "--out",
        patch_folder,
    )
    result = run(*words, "--overwrite")
    assert result.code == 0, result.err
    assert result.err == ""
    assert str(patch_folder) in result.out
    assert (patch_folder / "patch_model.safetensors").read_bytes() == tensors


def test_edit_a_language_model(run: Callable[..., Any], tmp_path: Path) -> None:
    """A folder whose config.json names a language model: the target is text, and the set fits the folder."""
    from tests.editors.lm import make_requests, model_of, tokenizer_of
    from xpatch.patches.requests import write_requests

    model_of("gpt2").save_pretrained(tmp_path / "lm")
    words = (
        "edit",
        "--model",
        tmp_path / "lm",
        "--requests",
        tmp_path / "fixes.jsonl",
        "--memory",
        tmp_path / "memory.jsonl",
    )
    write_requests(make_requests("gpt2", 1), tmp_path / "fixes.jsonl")
    (tmp_path / "memory.jsonl").write_text('{"language": "en", "text": "name9 was born in"}\n', encoding="utf-8")
    tokenizer_of("gpt2").save_pretrained(tmp_path / "lm")
    result = run(*words, "--out", tmp_path / "out", "--json")
    found = json.loads(result.out)
    assert result.code == (0 if found["status"] == {"edited": 1} else 1), result.err
    assert found["edits"][0]["id"] == "edit-0" and " in en" in found["edits"][0]["message"]
    assert run("inspect", tmp_path / "out", "--model", tmp_path / "lm").code == 0
    result = run(*words, "--method", "grace", "--out", tmp_path / "grace")
    assert result.code == 2 and "methods for it: calinet, ft, ft-l, mpn" in result.err
    asked = ("evaluate", "--model", tmp_path / "lm", "--cases", tmp_path / "fixes.jsonl", "--json")
    before, after = (json.loads(run(*asked, *more).out)["metrics"] for more in ((), ("--patches", tmp_path / "out")))
    assert before["reliability"]["value"] == 0 and after["reliability"]["value"] == float(
        found["status"] == {"edited": 1}
    )
    again = ("edit", "--from", tmp_path / "out", "--model", tmp_path / "lm", "--memory", tmp_path / "memory.jsonl")
    result = run(*again, "--out", tmp_path / "again", "--json")
    assert json.loads(result.out)["fingerprint"] == found["fingerprint"] or result.code == 1, result.err


def test_edit_names_what_it_rejects(
    run: Callable[..., Any], model_folder: Path, requests_file: Path, memory_file: Path, tmp_path: Path
) -> None:
    """One bad line: a line about it, exit code 0, for the rest was edited. Nothing but bad lines: exit code 1, and a ledger."""
    bad = json.dumps({"id": "bad", "text": "Paris", "target": "MAYBE"}) + "\n"
    requests_file.write_text(bad + requests_file.read_text(encoding="utf-8"), encoding="utf-8")
    words = ("edit", "--model", model_folder, "--requests", requests_file, "--memory", memory_file)
    result = run(*words, "--out", tmp_path / "fixes")
    assert result.code == 0, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("rejected"))
    assert line.startswith("rejected bad: ") and "no label 'MAYBE'; labels: REFUTES, SUPPORTS" in line
    assert "1 rejected" in result.out

    requests_file.write_text(bad, encoding="utf-8")
    result = run(*words, "--out", tmp_path / "none", "--json")
    assert result.code == 1, result.err
    assert json.loads(result.out)["status"] == {"rejected": 1}
    assert "bad" in run("inspect", tmp_path / "none").out


def test_edit_languages(
    run: Callable[..., Any], model_folder: Path, requests_file: Path, memory_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fixes"
    words = (
        "--model",
        model_folder,
        "--requests",
        requests_file,
        "--memory",
        memory_file,
        "--out",
        out,
        "--languages",
        "en,de",
    )
    assert run("edit", *words).code == 0
    assert "2 edits" in run("inspect", out).out


def test_inspect(run: Callable[..., Any], model_folder: Path, patch_folder: Path) -> None:
    result = run("inspect", patch_folder, "--model", model_folder)
    assert result.code == 0, result.err
    for word in (
        "2 edits",
        "bert.encoder.layer.1",
        "keys",
        "BertForSequenceClassification",
        "REFUTES",
        "fits this model",
    ):
        assert word in result.out
    found = json.loads(run("inspect", patch_folder, "--model", model_folder, "--json").out)
    assert found["fits"] is True
    assert [edit["id"] for edit in found["patches"]["edits"]] == ["1", "2"]
    assert found["patches"]["base"]
    sites = found["model"]["sites"]
    assert [(site["layer"], site["width"], site["inner"]) for site in sites] == [(0, 32, 64), (1, 32, 64)]


def test_inspect_model_alone(run: Callable[..., Any], any_model_folder: Path) -> None:
    result = run("inspect", "--model", any_model_folder)
    assert result.code == 0, result.err
    assert "encoder.layer.1" in result.out


def test_evaluate_table_and_report(
    run: Callable[..., Any],
    model_folder: Path,
    patch_folder: Path,
    requests_file: Path,
    memory_file: Path,
    tmp_path: Path,
) -> None:
    words = ("--model", model_folder, "--cases", requests_file, "--patches", patch_folder, "--locality", memory_file)
    result = run("evaluate", *words, "--out", tmp_path / "report.json")
    assert result.code == 0, result.err
    assert "needed" in result.out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["predictions"]["edit"]["en"]["id"] == ["1", "2"]


@pytest.mark.slow
def test_export(run: Callable[..., Any], model_folder: Path, patch_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    base, adapter = tmp_path / "onnx", tmp_path / "fixes.onnx_adapter"
    result = run("export", "base", model_folder, "--out", base)
    assert result.code == 0, result.err
    result = run("export", "adapter", patch_folder, "--base", base, "--out", adapter)
    assert result.code == 0, result.err
    assert (base / "model.onnx").stat().st_size > 0
    assert adapter.stat().st_size > 0
    result = run("export", "verify", base, model_folder, patch_folder)
    assert result.code == 0 and "largest difference" in result.out, result.err
    found = json.loads(run("export", "verify", base, model_folder, patch_folder, "--json").out)
    assert found["ok"] and set(found["all"]["languages"]) == {"en", "de", "fr"} and found["all"]["max_diff"] < 1e-4
    result = run("export", "verify", base, model_folder, patch_folder, "--tolerance", "0")
    assert result.code == 1


def test_module_and_script_agree(tmp_path: Path) -> None:
    """`python -m xpatch` is the console script; a bad call leaves exit code 2 in a real process."""
    call = [sys.executable, "-m", "xpatch", "inspect", str(tmp_path / "nothing")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("xpatch: ")
