"""`xpatch bench swap`: its options reach the benchmark, its table and file are what people and machines read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_swap_help_has_an_example(run: Callable[..., Any]) -> None:
    result = run("bench", "swap", "--help")
    assert result.code == 0
    assert "Example: xpatch bench swap" in result.out


def test_swap_writes_a_file_and_prints_the_goals(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command with two quick parts for real; the others, minutes long, are left out."""
    from xpatch.benchmarks import swap

    asked: dict[str, Any] = {}
    whole = swap.run

    def short(*args: Any, **options: Any) -> dict[str, Any]:
        asked.update(options)
        return whole(*args, **options, only=("fuzz", "soak"), threads=2)

    monkeypatch.setattr(swap, "run", short)
    out = tmp_path / "swap.json"
    words = ("--soak-swaps", 8, "--crash-writes", 3, "--fuzz-files", 5, "--seed", 1, "--json", out)
    result = run("bench", "swap", *words)
    assert result.code == 0, result.err
    assert asked == {"soak_swaps": 8, "crash_writes": 3, "fuzz_files": 5, "seed": 1}
    assert "soak: torn" in result.out and str(out) in result.out.replace("\n", "")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["soak"]["swaps"] == 8 and found["fuzz"]["files"] == 5 and found["header"]["seeds"] == [1]


@pytest.mark.parametrize("words", [("--soak-swaps", "1"), ("--fuzz-files", "0"), ("--seed", "-1")], ids=" ".join)
def test_swap_refuses_numbers_out_of_range(run: Callable[..., Any], tmp_path: Path, words: tuple[str, str]) -> None:
    result = run("bench", "swap", *words, "--json", tmp_path / "swap.json")
    assert result.code == 2 and words[0] in result.err
    assert list(tmp_path.iterdir()) == []


def test_swap_refuses_a_file_it_cannot_write(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("bench", "swap", "--json", tmp_path)
    assert result.code == 2 and "is a folder" in result.err
