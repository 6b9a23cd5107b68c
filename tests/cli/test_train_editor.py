"""`xpatch train-editor`, and `xpatch edit` with what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ("france", "germany", "allemagne", "deutschland")
QUICK = ("--set", "rank=8", "--set", "layers=1", "--set", "validation_edits=4", "--set", "edits_per_step=2")


@pytest.fixture
def facts_file(tmp_path: Path) -> Path:
    rows = [
        {"id": str(number), "text": f"the capital of {word} is {city}", "parallel": {"de": f"{word} {city}"}}
        for number, (word, city) in enumerate((w, c) for w in WORDS for c in ("paris", "berlin"))
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_train_and_edit(
    run: Callable[..., Any], any_model_folder: Path, facts_file: Path, requests_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "editor"
    words = (
        "--model",
        any_model_folder,
        "--requests",
        facts_file,
        "--method",
        "lime-mend",
        "--out",
        out,
        "--steps",
        "2",
    )
    words = (*words, "--edit-languages", "en,de", "--outer-languages", "all", *QUICK)
    result = run("train-editor", *words, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["steps"] == 2 and found["best_step"] == 2 and 0 <= found["validation"]["kept"] <= 1
    again = run("train-editor", *words)  # finished: nothing to do but to show it
    assert again.code == 0 and "best at step 2 of 2" in again.out, again.err
    fixes = tmp_path / "fixes"
    edit = ("edit", "--model", any_model_folder, "--requests", requests_file, "--method", "lime-mend", "--out", fixes)
    result = run(*edit, "--preset", "paper", "--editor", out, "--json")
    assert result.code == 0, result.err
    import xpatch

    patches = xpatch.load(fixes)
    assert patches.parts and all(record.method == "lime-mend" for record in patches.edits)


def test_wrong_words(run: Callable[..., Any], any_model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    words = ("train-editor", "--model", any_model_folder, "--requests", facts_file, "--out", tmp_path / "editor")
    for more, expected in (
        (("--method", "mpn"), "no editor to train"),
        (("--set", "rank"), "NAME=VALUE"),
        (("--set", "rank=0"), "rank"),
        (("--edit-languages", "fr"), "edit languages"),
    ):
        result = run(*words, *more)
        assert result.code == 2 and expected in result.err, result.err
    result = run(
        "edit", "--model", any_model_folder, "--requests", facts_file, "--method", "mend", "--out", tmp_path / "x"
    )
    assert result.code == 1 and "no target" in result.out  # every request is rejected, by name
