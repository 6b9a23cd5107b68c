"""`xpatch edit --from SET`: a set's own requests on an upgraded model, from the shell."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from xpatch import zoo


@pytest.fixture
def again(
    run: Callable[..., Any], trained: Path, other_folder: Path, memory_file: Path, tmp_path: Path
) -> Callable[..., Any]:
    """`xpatch edit --from` with good values for what the caller does not give; None leaves an option out, True is a flag."""

    def call(*more: str, **options: object) -> Any:
        given = {
            "from": trained, "model": other_folder, "memory": memory_file, "out": tmp_path / "new", **options
        }  # fmt: skip
        words = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
        return run("edit", *words, *more)

    return call


def refuse(result: Any, *words: str) -> None:
    assert result.code == 2, result
    assert result.out == "" and "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err


def changed(folder: Path, out: Path, change: Callable[[Any], Any]) -> Path:
    """The set in `folder` with its records changed, saved to `out`."""
    patches = xpatch.load(folder)
    xpatch.save(dataclasses.replace(patches, edits=tuple(change(record) for record in patches.edits)), out)
    return out


def test_a_set_is_trained_again_on_another_model(
    again: Callable[..., Any], run: Callable[..., Any], trained: Path, other_folder: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    result = again("--json")
    found = json.loads(result.out)
    assert result.err == ""
    assert result.code == (0 if found["holds"] else 1)
    assert [edit["id"] for edit in found["report"]["edits"]] == ["1", "2"]
    assert found["report"]["compared"] is False
    new = xpatch.load(tmp_path / "new")
    assert found["fingerprint"] == new.fingerprint and found["report"]["retrained"] == new.fingerprint
    assert found["report"]["patches"] == xpatch.load(trained).fingerprint
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    assert run("inspect", tmp_path / "new", "--model", other_folder).code == 0


def test_the_table_is_for_people_and_the_report_for_files(
    again: Callable[..., Any], model_folder: Path, tmp_path: Path
) -> None:
    result = again(**{"old-model": model_folder, "report": tmp_path / "reports" / "upgrade.json"})
    report = json.loads((tmp_path / "reports" / "upgrade.json").read_text(encoding="utf-8"))
    assert report["compared"] is True
    assert {edit["status"] for edit in report["edits"]} <= {"holds", "already-right", "lost", "failed"}
    assert report["languages"]["de"]["old"] == 1  # the set held there
    for word in ("old set", "new base", "new set", "lost", "fr", str(tmp_path / "new")):
        assert word in result.out
    held = all(edit["status"] in ("holds", "already-right") for edit in report["edits"])
    assert result.code == (0 if held else 1), result


def test_the_same_model_needs_no_other_set(
    again: Callable[..., Any], trained: Path, model_folder: Path, tmp_path: Path
) -> None:
    """All hold: exit code 0, and the same tensors."""
    result = again(model=model_folder)
    assert result.code == 0, result.err + result.out
    for folder in (trained, tmp_path / "new"):
        assert (folder / "patch_model.safetensors").exists()
    assert xpatch.load(tmp_path / "new").fingerprint == xpatch.load(trained).fingerprint


def test_what_no_longer_holds_is_listed_and_exits_with_1(
    again: Callable[..., Any], trained: Path, model_folder: Path, tmp_path: Path
) -> None:
    """One step of training is recorded, which is too few."""
    weak = {"preset": "default", "steps": 1, "rounds": 0, "rescue": False, "learning_rate": 1e-6}
    folder = changed(
        trained, tmp_path / "weak", lambda record: dataclasses.replace(record, hyperparameters=weak, rows={})
    )
    result = again(**{"from": folder, "model": model_folder, "old-model": None})
    assert result.code == 1
    assert "2 no longer hold" in result.out and "still wrong in" in result.out


def test_redacted_edits_fail_unless_they_may_be_skipped(
    again: Callable[..., Any], trained: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = changed(
        trained, tmp_path / "redacted", lambda record: dataclasses.replace(record, request=None) if record.id == "2" else record
    )  # fmt: skip
    options = {"from": folder, "model": model_folder}
    result = again(**options)
    assert result.code == 1
    assert "1 not trained" in result.out and "redacted" in result.out
    result = again("--skip-redacted", "--overwrite", "--json", **options)
    assert result.code == 0, result.out
    found = json.loads(result.out)
    assert found["status"] == {"holds": 1, "redacted": 1} and found["holds"] is True
    assert [record.id for record in xpatch.load(tmp_path / "new").edits] == ["1"]


def test_expired_edits_are_left_out_and_named(
    again: Callable[..., Any], trained: Path, model_folder: Path, tmp_path: Path
) -> None:
    def expire(record: Any) -> Any:
        date = {"1": "2020-01-01", "2": "2990-01-01"}[record.id]
        return dataclasses.replace(record, request=record.request.model_copy(update={"expires": date}))

    result = again(**{"from": changed(trained, tmp_path / "expiring", expire), "model": model_folder})
    assert result.code == 0, result.out + result.err
    assert "expired 2020-01-01" in result.out


def test_either_requests_or_from(run: Callable[..., Any], trained: Path, model_folder: Path, requests_file: Path, tmp_path: Path) -> None:  # fmt: skip
    words = ("edit", "--model", model_folder, "--out", tmp_path / "new")
    refuse(run(*words), "--requests FILE", "--from SET")
    refuse(run(*words, "--requests", requests_file, "--from", trained), "either")
    for option in (("--report", tmp_path / "r.json"), ("--old-model", model_folder), ("--skip-redacted",)):
        refuse(run(*words, "--requests", requests_file, *option), option[0], "--from SET")
    assert not (tmp_path / "new").exists()


def test_bad_input_is_one_message_and_leaves_nothing(
    again: Callable[..., Any], trained: Path, model_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    neurons = xpatch.PatchNeurons(
        site="bert.encoder.layer.1", keys=torch.zeros(1, 32), bias=torch.zeros(1), values=torch.zeros(1, 32), activation="relu"
    )  # fmt: skip
    xpatch.save(xpatch.PatchSet(parts={"neurons": neurons}), tmp_path / "bare")
    hidden = changed(trained, tmp_path / "hidden", lambda record: dataclasses.replace(record, request=None))
    magic = changed(trained, tmp_path / "magic", lambda record: dataclasses.replace(record, method="magic"))
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    refuse(again(**{"from": tmp_path / "nothing"}), "nothing", "patch folder")
    refuse(again(**{"from": tmp_path / "bare"}), "ledger holds no edits")
    refuse(again(**{"from": hidden}), "none of the 2 edits", "redacted")
    refuse(again(**{"from": magic}), "no method 'magic'", "--method")
    refuse(again(method="mnp"), "'mnp'", "t-patcher")
    refuse(again(preset="best"), "'best'", "paper")
    refuse(again(languages="en,xx"), "xx", "de, en, fr")
    refuse(again(model=tmp_path / "nowhere"), "nowhere")
    refuse(again(out=tmp_path / "file"), "is a file")
    refuse(again(out=tmp_path / "bare"), "already holds", "--overwrite")
    refuse(again(report=tmp_path), "--report", "is a folder")
    refuse(again(**{"old-model": other_folder}), "old base is not the one this set was made for")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_labels_are_named(again: Callable[..., Any], other_folder: Path, tmp_path: Path) -> None:
    import shutil

    renamed = shutil.copytree(other_folder, tmp_path / "renamed")
    config = json.loads((renamed / "config.json").read_text())
    config |= {"id2label": {"0": "false", "1": "true"}, "label2id": {"false": 0, "true": 1}}
    (renamed / "config.json").write_text(json.dumps(config))
    refuse(again(model=renamed), "no label 'REFUTES' (2 edits, first '1')", "false, true")
    assert not (tmp_path / "new").exists()


def test_the_bundled_verifier_upgraded(run: Callable[..., Any], tmp_path: Path) -> None:
    """From requests on the verifier to a new set on a verifier with slightly other weights, all by the command line."""
    from xpatch.evaluation import predict
    from xpatch.patches.requests import write_requests
    from xpatch.zoo.verifier.data import memory_texts, requests

    model, tokenizer = zoo.load("verifier")
    wanted = requests("edit")[:40]
    said = predict(model, tokenizer, [request.versions["en"].text for request in wanted])
    wrong = [request for request, answer in zip(wanted, said, strict=True) if answer != request.target][:3]
    write_requests([request.model_copy(update={"versions": {code: request.versions[code] for code in ("en", "de")}}) for request in wrong], tmp_path / "fixes.jsonl")  # fmt: skip
    (tmp_path / "memory.jsonl").write_text(
        "".join(json.dumps({"language": code, "text": text}) + "\n" for code in ("en", "de") for text in memory_texts(8)[code])
    )  # fmt: skip
    torch.manual_seed(0)
    newer = copy.deepcopy(model)
    with torch.no_grad():
        for weight in newer.parameters():
            weight.add_(0.02 * weight.std() * torch.randn_like(weight))
    newer.save_pretrained(tmp_path / "newer")
    tokenizer.save_pretrained(tmp_path / "newer")

    memory = ("--memory", tmp_path / "memory.jsonl")
    words = ("--model", "verifier", "--requests", tmp_path / "fixes.jsonl", "--out", tmp_path / "fixes", *memory)
    assert run("edit", *words).code == 0
    words = ("--from", tmp_path / "fixes", "--model", tmp_path / "newer", "--old-model", "verifier", *memory)
    result = run("edit", *words, "--out", tmp_path / "new", "--report", tmp_path / "report.json")
    assert result.code == 0, result.out + result.err
    assert "3 holds" in result.out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for code in ("en", "de"):
        assert report["languages"][code]["texts"] == report["languages"][code]["after"] == 3
        assert report["languages"][code]["old"] == 3 and report["languages"][code]["lost"] == 0
    assert report["languages"]["en"]["before"] == 0
    assert run("inspect", tmp_path / "new", "--model", tmp_path / "newer").code == 0
    assert run("inspect", tmp_path / "new", "--model", "verifier").code == 2
