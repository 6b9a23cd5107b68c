"""`xpatch diff` and `xpatch check` on the tiny model and its trained edits."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXTS = [
    {"text": "The capital of France is Berlin.", "language": "en"},
    {"text": "Die Hauptstadt von Frankreich ist Berlin.", "language": "de"},
    {"text": "germany is the capital", "language": "en"},
]


@pytest.fixture
def texts_file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["diff", "check"])
def test_help_has_an_example(run: Callable[..., Any], command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0 and f"Example: xpatch {command}" in result.out


def test_base_against_a_folder(
    run: Callable[..., Any], model_folder: Path, patch_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "changes.csv"
    words = ("diff", "--model", model_folder, "--patches", patch_folder, "--texts", texts_file)
    result = run(*words, "--out", out)
    assert result.code == 0, result.err
    assert result.err == "" and "predictions change" in result.out
    found = json.loads(run(*words, "--json").out)
    assert found["texts"] == 3 and found["changed"] >= 1
    assert found["by_language"]["en"]["texts"] == 2
    changed = {row["text"]: row for row in found["rows"]}
    row = changed["The capital of France is Berlin."]
    assert (row["before"], row["after"]) == ("SUPPORTS", "REFUTES") and row["fired_after"]
    with out.open(encoding="utf-8", newline="") as file:
        assert [line["text"] for line in csv.DictReader(file)] == [row["text"] for row in found["rows"]]
    assert len(json.loads(run(*words, "--json", "--all").out)["rows"]) == 3


def test_one_folder_against_another(
    run: Callable[..., Any], model_folder: Path, patch_folder: Path, texts_file: Path
) -> None:
    words = ("diff", "--model", model_folder, "--patches", patch_folder, patch_folder, "--texts", texts_file)
    result = run(*words)
    assert result.code == 0, result.err
    assert "0 of 3 predictions change (en 0 of 2, de 0 of 1)" in result.out


def test_plain_text_lines(run: Callable[..., Any], model_folder: Path, patch_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text["text"] for text in TEXTS) + "\n", encoding="utf-8")
    result = run("diff", "--model", model_folder, "--patches", patch_folder, "--texts", path)
    assert result.code == 0, result.err
    assert "of 3 predictions change (? " in result.out


def test_bad_input_is_one_line_and_writes_nothing(
    run: Callable[..., Any],
    model_folder: Path,
    other_folder: Path,
    patch_folder: Path,
    texts_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "changes.csv"
    good = {"--model": model_folder, "--patches": patch_folder, "--texts": texts_file, "--out": out}
    (tmp_path / "broken.jsonl").write_text('{"text": 5}\n', encoding="utf-8")
    for option, value, words in (
        ("--texts", tmp_path / "no.jsonl", "does not exist"),
        ("--texts", tmp_path / "broken.jsonl", "line 1"),
        ("--patches", tmp_path / "no", "no"),
        ("--model", other_folder, "do not fit"),
        ("--out", tmp_path, "is a folder"),
    ):
        result = run("diff", *(word for pair in {**good, option: value}.items() for word in pair))
        assert result.code == 2, (option, result.err)
        assert words in result.err and result.err.startswith("xpatch: ") and "Traceback" not in result.err
    assert not out.exists()


def test_check_finds_nothing_in_edits_that_agree(
    run: Callable[..., Any], model_folder: Path, patch_folder: Path
) -> None:
    result = run("check", patch_folder, "--model", model_folder)
    assert result.code == 0, result.err
    assert "no conflict found" in result.out


def test_check_fails_on_a_contradiction(
    run: Callable[..., Any], model_folder: Path, patch_folder: Path, tmp_path: Path
) -> None:
    """The same edits with the other target, as another folder that is served already."""
    from dataclasses import replace

    import xpatch

    patches = xpatch.load(patch_folder)
    turned = []
    for record in patches.edits:
        assert record.request is not None
        turned.append(replace(record, request=record.request.model_copy(update={"target": "SUPPORTS"})))
    xpatch.save(replace(patches, edits=tuple(turned), name="other"), tmp_path / "other")
    result = run("check", patch_folder, tmp_path / "other", "--model", model_folder)
    assert result.code == 1, result.err
    assert "edits of one claim with different targets" in result.out
    found = json.loads(run("check", patch_folder, tmp_path / "other", "--model", model_folder, "--json").out)
    assert found["ok"] is False and len(found["contradictions"]) == 4
    same = shutil.copytree(patch_folder, tmp_path / "same")
    twice = json.loads(run("check", patch_folder, same, "--model", model_folder, "--json").out)
    assert twice["contradictions"] == []  # edits may pull at each other's answers when all of them act twice
