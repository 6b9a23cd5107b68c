"""The README is run: its Python blocks as printed, its JSON read, its shell commands parsed and, for `xpatch`, executed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


@pytest.fixture
def reader(model_folder: Path, memory_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder: my-model, fixes.jsonl as printed, keep.jsonl."""
    place = tmp_path / "reader"
    place.mkdir()
    shutil.copytree(model_folder, place / "my-model")
    (place / "fixes.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    shutil.copy(memory_file, place / "keep.jsonl")
    monkeypatch.chdir(place)
    return place


def test_python_blocks_run_as_printed(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), names)
    assert "neurons" in capsys.readouterr().out
    assert (reader / "fixes" / "patch_config.json").is_file()


def test_first_example_is_short() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 12


def test_json_blocks() -> None:
    from xpatch.patches.config import parse_config
    from xpatch.patches.requests import EditRequest

    request, config = blocks("json")
    assert sorted(EditRequest.model_validate(json.loads(request)).versions) == ["de", "en"]
    assert parse_config(config, where="README.md").parts["neurons"].site == "bert.encoder.layer.3"


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def test_shell_blocks(reader: Path, run: Callable[..., Any]) -> None:
    """`xpatch` lines run in order on the reader's files; make targets exist; nothing else is printed."""
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for line in shell_lines():
        program, *words = shlex.split(line, comments=True)
        if program == "xpatch":
            result = run(*words)
            assert result.code == 0, (line, result.err)
        elif program == "make":
            assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE), line
        else:
            assert (program, words[0]) == ("pip", "install"), line


def test_paths_and_links_exist() -> None:
    text = README.read_text(encoding="utf-8")
    paths = re.findall(r"^\| `([\w./]+)`", text[text.index("## Where things live") :], flags=re.MULTILINE)
    paths += re.findall(r"\]\(([\w./]+)\)", text)
    assert paths
    for path in paths:
        assert (README.parent / path).exists(), path


def test_results_block_is_what_the_result_files_say() -> None:
    """The block between the marks is generated: nobody typed a figure."""
    from xpatch.benchmarks import readme

    text = README.read_text(encoding="utf-8")
    results = README.parent / "benchmarks" / "results"
    assert readme.rewrite(text, results) == text
    page = (results / readme.PAGE).read_text(encoding="utf-8")
    assert readme.page(results) == page
    for path in re.findall(r"\]\(([\w./]+)\)", page):
        assert (results / path).exists(), path
