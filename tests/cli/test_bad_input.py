"""Every kind of bad input: one clear message on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def refuse(result: Any, *words: str) -> None:
    """One message that holds `words`, no traceback, nothing on stdout, exit code 2."""
    assert result.code == 2, result
    assert result.out == ""
    assert "Traceback" not in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("xpatch")]) == 1, result.err
    for word in words:
        assert word in result.err, result.err


@pytest.fixture
def edit(run: Callable[..., Any], model_folder: Path, requests_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """`xpatch edit` with good values for what the caller does not give; checks that a refused call left nothing."""

    def call(**options: object) -> Any:
        given = {"model": model_folder, "requests": requests_file, "out": tmp_path / "fixes", **options}
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        before = sorted(tmp_path.rglob("*"))
        result = run("edit", *words)
        assert sorted(tmp_path.rglob("*")) == before
        return result

    return call


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


GOOD = '{"id": "1", "text": "a claim", "target": "REFUTES"}'


def test_missing_model_folder(edit: Callable[..., Any], tmp_path: Path) -> None:
    refuse(edit(model=tmp_path / "nowhere"), "nowhere", "does not exist")


def test_folder_without_a_model(edit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(edit(model=tmp_path / "empty"), "config.json")


def test_damaged_model(edit: Callable[..., Any], model_folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refuse(edit(model=broken), "broken", "cannot be loaded")


def test_model_without_a_trained_head(edit: Callable[..., Any], model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(model_folder).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "encoder")
    refuse(edit(model=tmp_path / "encoder"), "classifier")


def test_unknown_method(edit: Callable[..., Any]) -> None:
    refuse(edit(method="mnp"), "'mnp'", "mpn", "t-patcher")


def test_unknown_preset(edit: Callable[..., Any]) -> None:
    refuse(edit(preset="best"), "'best'", "paper")


def test_unknown_language(edit: Callable[..., Any]) -> None:
    refuse(edit(languages="en,xx"), "xx", "de, en, fr")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ('{"id": "2", "text": ', ("line 2", "not valid JSON", '{"id": "2", "text":')),
        ("[1, 2]", ("line 2", "[1, 2]")),
        ('{"id": "2"}', ("line 2", "versions")),
        ('{"id": "2", "text": "a", "colour": "red"}', ("line 2", "colour")),
        ('{"id": "1", "text": "the same id"}', ("'1'", "twice")),
    ],
)
def test_broken_line(edit: Callable[..., Any], tmp_path: Path, broken: str, words: tuple[str, ...]) -> None:
    refuse(edit(requests=lines(tmp_path / "broken.jsonl", GOOD, broken)), "broken.jsonl", *words)


def test_binary_requests(edit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    refuse(edit(requests=tmp_path / "binary.jsonl"), "binary.jsonl")


def test_missing_requests(edit: Callable[..., Any], tmp_path: Path) -> None:
    refuse(edit(requests=tmp_path / "nothing.jsonl"), "nothing.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_requests(edit: Callable[..., Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    refuse(edit(requests=tmp_path / "empty.jsonl"), "empty.jsonl", "no edit request")


def test_missing_and_broken_memory(edit: Callable[..., Any], tmp_path: Path) -> None:
    refuse(edit(memory=tmp_path / "nothing.jsonl"), "nothing.jsonl")
    refuse(edit(memory=lines(tmp_path / "m.jsonl", '{"language": "en"')), "m.jsonl", "line 1")


def test_out_below_a_file(edit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse(edit(out=tmp_path / "file" / "fixes"), "is not a folder")


def test_out_is_a_file(edit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    refuse(edit(out=tmp_path / "file"), "is a file")
    assert (tmp_path / "file").read_text() == "kept"


def test_out_holds_other_files(edit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    refuse(edit(out=tmp_path / "mine"), "other files")


def test_no_write_permission(edit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode, **kwargs: mode == os.R_OK)
    refuse(edit(), "no permission")


def test_disk_full_while_saving(edit: Callable[..., Any], memory_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr("os.rename", full)
    monkeypatch.setattr("pathlib.Path.rename", full)
    monkeypatch.setattr("pathlib.Path.replace", full)
    refuse(edit(memory=memory_file), "No space left")


def test_unknown_option_and_command(run: Callable[..., Any]) -> None:
    refuse(run("edit", "--modle", "x"), "--modle", "--help")
    refuse(run("edti"), "edti")
    refuse(run("edit"), "--model")


def test_patch_folder_is_not_replaced_unasked(edit: Callable[..., Any], patch_folder: Path) -> None:
    refuse(edit(out=patch_folder), "already holds", "--overwrite")


def test_patch_for_another_base(
    run: Callable[..., Any], patch_folder: Path, other_folder: Path, requests_file: Path
) -> None:
    refuse(run("inspect", patch_folder, "--model", other_folder), "expected", "found")
    refuse(
        run("evaluate", "--model", other_folder, "--cases", requests_file, "--patches", patch_folder),
        "expected",
        "found",
    )


def test_truncated_tensors(run: Callable[..., Any], patch_folder: Path) -> None:
    tensors = patch_folder / "patch_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    refuse(run("inspect", patch_folder), "patch_model.safetensors")


def test_corrupted_tensors(run: Callable[..., Any], patch_folder: Path) -> None:
    tensors = patch_folder / "patch_model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 0xFF
    tensors.write_bytes(bytes(content))
    refuse(run("inspect", patch_folder), str(patch_folder), "tensors were changed")


def test_broken_config(run: Callable[..., Any], patch_folder: Path) -> None:
    config = patch_folder / "patch_config.json"
    content = config.read_text(encoding="utf-8")
    config.write_text(content[: len(content) // 2], encoding="utf-8")
    refuse(run("inspect", patch_folder), "patch_config.json")
    config.write_text(json.dumps({**json.loads(content), "colour": "red"}), encoding="utf-8")
    refuse(run("inspect", patch_folder), "patch_config.json", "colour")


def test_missing_patch_folder(run: Callable[..., Any], tmp_path: Path) -> None:
    refuse(run("inspect", tmp_path / "nothing"), "nothing")
    refuse(run("inspect"), "nothing to inspect")


def test_debug_shows_the_traceback(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "nothing", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
