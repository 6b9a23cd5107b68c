"""`--set NAME=VALUE` replaces single settings of a preset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import xpatch


def test_settings_are_read_and_checked(
    run: Callable[..., Any], model_folder: Path, requests_file: Path, memory_file: Path, tmp_path: Path
) -> None:
    words = (
        "edit",
        "--model",
        model_folder,
        "--requests",
        requests_file,
        "--memory",
        memory_file,
        "--out",
        tmp_path / "out",
        "--method",
        "ft",
    )
    for setting, named in (("rank", "NAME=VALUE"), ("rnak=8", "no setting 'rnak'"), ("rank=many", "setting rank")):
        result = run(*words, "--set", setting)
        assert result.code == 2 and named in result.err and not (tmp_path / "out").exists()
    result = run(*words, "--set", "rank=2", "--set", "steps=3")
    assert result.code in (0, 1)
    part = next(iter(xpatch.load(tmp_path / "out").parts.values()))
    assert part.form == "lowrank" and part.count <= 2 * 2
