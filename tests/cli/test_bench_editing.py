"""`xpatch bench editing`: options reach the benchmark, its table and file are what people and machines read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_help_has_an_example(run: Callable[..., Any]) -> None:
    result = run("bench", "editing", "--help")
    assert result.code == 0 and "Example: xpatch bench editing" in result.out


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled verifier for real, with a memory of few claims."""
    from xpatch.benchmarks import editing

    sizes = {"verifier": editing.Size({"plain": 1, "cached": 1, "chunked": 2}, memory=5, watched=4)}
    monkeypatch.setattr(editing, "SIZES", {**editing.SIZES, **sizes})


@pytest.mark.usefixtures("small")
def test_editing_writes_a_file_and_prints_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "editing.json"
    words = ("--bases", "verifier", "--procedures", "plain,chunked", "--steps", 4, "--seeds", 2, "--json", out)
    result = run("bench", "editing", *words)
    assert result.code == 0, result.err
    assert "chunked" in result.out and "plain" in result.out and str(out) in result.out.replace("\n", "")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["procedure"], row["edits"], row["steps"]) for row in found["rows"]] == [
        ("plain", 1, 4),
        ("chunked", 2, 4),
    ]
    assert found["header"]["seeds"] == [2] and found["goals"] == []


def test_scale_hands_on_its_counts(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the counts arrive; the benchmark itself is run in tests/benchmarks."""
    from xpatch.benchmarks import editing_scale

    asked: dict[str, Any] = {}

    def note(out: Path, **options: Any) -> Any:
        asked.update(options)
        return {"header": {"machine": {"cpu": "this one"}}, "rows": [], "goals": []}

    monkeypatch.setattr(editing_scale, "run", note)
    result = run(
        "bench", "editing", "--scale", "--counts", "5,50", "--steps", 3, "--seeds", 1, "--json", tmp_path / "s.json"
    )
    assert result.code == 0, result.err
    assert asked == {"counts": [5, 50], "seed": 1, "steps": 3}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bases", "gpt-5"), "choose from verifier"),
        (("--procedures", "magic"), "choose from plain"),
        (("--seeds", "x"), "--seeds"),
        (("--counts", "10"), "goes with --scale"),
        (("--edits", "0"), "--edits"),
    ],
)
def test_refuses_bad_options(run: Callable[..., Any], tmp_path: Path, words: tuple[str, str], said: str) -> None:
    result = run("bench", "editing", *words, "--json", tmp_path / "out.json")
    assert result.code == 2 and said in result.err
    assert list(tmp_path.iterdir()) == []
