"""`xpatch edit --checkpoint`: an interrupted command goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xpatch
from xpatch.editors.t_patcher import editor as neurons


def test_an_interrupted_command_goes_on_and_says_so(
    run: Callable[..., Any], model_folder: Path, requests_file: Path, memory_file: Path, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    half, out = tmp_path / "half", tmp_path / "fixes"
    words = ("edit", "--model", model_folder, "--requests", requests_file, "--memory", memory_file, "--out", out)
    words = (*words, "--checkpoint", half)
    with monkeypatch.context() as patched:
        patched.setattr(neurons, "train", _interrupt)
        stopped = run(*words)
    assert stopped.code == 130 and not out.exists()
    assert f"interrupted; the same command goes on from {half}" in " ".join(stopped.err.split())
    other = run(*words, "--seed", "1")
    assert other.code == 2 and "seed was 0, now 1" in other.err and str(half) in other.err
    done = run(*words)
    assert done.code == 0 and done.err == "", done
    assert xpatch.load(out).fingerprint == xpatch.load(trained).fingerprint
    with monkeypatch.context() as patched:  # finished: nothing is trained
        patched.setattr(neurons, "train", _interrupt)
        again = run(*words, "--overwrite", "--json")
    assert again.code == 0 and json.loads(again.out)["fingerprint"] == xpatch.load(trained).fingerprint


def test_from_a_set(
    run: Callable[..., Any], trained: Path, other_folder: Path, memory_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ("edit", "--from", trained, "--model", other_folder, "--memory", memory_file)
    plain = run(*words, "--out", tmp_path / "plain", "--json")
    words = (*words, "--checkpoint", tmp_path / "half")
    first = run(*words, "--out", tmp_path / "first", "--json")
    with monkeypatch.context() as patched:
        patched.setattr(neurons, "train", _interrupt)
        again = run(*words, "--out", tmp_path / "again", "--json")
    assert plain.code == first.code == again.code
    found = [json.loads(result.out)["fingerprint"] for result in (plain, first, again)]
    assert len(set(found)) == 1


def test_folders_that_will_not_do(
    run: Callable[..., Any], model_folder: Path, requests_file: Path, memory_file: Path, tmp_path: Path
) -> None:
    words = ("edit", "--model", model_folder, "--requests", requests_file, "--memory", memory_file)
    words = (*words, "--out", tmp_path / "fixes")
    for more, said in (
        (("--checkpoint", tmp_path / "fixes"), "is --out too"),
        (("--checkpoint", requests_file), "is a file"),
        (("--checkpoint", requests_file / "half"), "is not a folder"),
        (("--checkpoint", tmp_path / "half", "--method", "ft"), "cannot go on after an interruption"),
    ):
        result = run(*words, *more)
        assert result.code == 2 and said in result.err, result
    assert not (tmp_path / "fixes").exists()


def _interrupt(*arguments: Any) -> Any:
    raise KeyboardInterrupt
