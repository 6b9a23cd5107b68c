"""`xpatch export widened | merged | peft`: what they write is loaded without xpatch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from xpatch.models.anatomy import final_ffn
from xpatch.patches.identity import identify

Model = Any


@pytest.fixture
def model(model_folder: Path) -> Model:
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(model_folder).eval()


def logits(model: Model) -> torch.Tensor:
    tokens = torch.arange(4, 10).view(1, 6)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def saved(model: Model, part: Any, folder: Path) -> torch.Tensor:
    """Saves a set of one part and returns what the patched model answers."""
    patches = xpatch.PatchSet(parts={"a": part}, base=identify(model, site=part.site))
    xpatch.save(patches, folder)
    xpatch.apply(model, patches)
    found = logits(model)
    xpatch.remove(model)
    return found


def neurons(model: Model, activation: str | None = None) -> xpatch.PatchNeurons:
    site = final_ffn(model)
    torch.manual_seed(0)
    return xpatch.PatchNeurons(
        site=site.name, keys=torch.randn(3, site.width), bias=torch.ones(3), values=torch.randn(3, site.width),
        activation=activation or site.activation,
    )  # fmt: skip


def delta(model: Model) -> xpatch.LowRankDelta:
    site = final_ffn(model)
    torch.manual_seed(0)
    return xpatch.LowRankDelta(site=site.down, down=torch.randn(2, site.inner), up=torch.randn(site.width, 2))


@pytest.mark.parametrize(("command", "make"), [("widened", neurons), ("merged", delta)])
def test_a_checkpoint_answers_as_the_patched_model(
    command: str, make: Callable[..., Any], run: Callable[..., Any], model: Model, model_folder: Path, tmp_path: Path
) -> None:
    expected = saved(model, make(model), tmp_path / "fixes")
    result = run("export", command, model_folder, tmp_path / "fixes", "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    again = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_an_adapter_names_its_base(run: Callable[..., Any], model: Model, tmp_path: Path) -> None:
    saved(model, delta(model), tmp_path / "fixes")
    result = run("export", "peft", tmp_path / "fixes", "--out", tmp_path / "lora", "--base-model", "mine")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "mine"


def test_what_cannot_be_held_is_refused(
    run: Callable[..., Any], model: Model, model_folder: Path, tmp_path: Path
) -> None:
    saved(model, neurons(model, "relu"), tmp_path / "fixes")
    for command, words in (("widened", "activation"), ("merged", "widened")):
        result = run("export", command, model_folder, tmp_path / "fixes", "--out", tmp_path / "out")
        assert result.code != 0 and words in result.err and not (tmp_path / "out").exists()
    result = run("export", "peft", tmp_path / "fixes", "--out", tmp_path / "out")
    assert result.code != 0 and "low-rank deltas" in result.err
    result = run("export", "widened", tmp_path / "nowhere", tmp_path / "fixes", "--out", tmp_path / "out")
    assert result.code != 0 and "nowhere" in result.err


@pytest.fixture(scope="module")
def base(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's exported base, made by the command line."""
    pytest.importorskip("onnxruntime")
    from xpatch.cli import main

    folder = tmp_path_factory.mktemp("base") / "onnx"
    assert main(["export", "base", str(model_folder), "--out", str(folder)]) == 0
    return folder


def test_a_quantised_base_serves_the_adapter_of_the_base_it_is_made_from(
    run: Callable[..., Any], base: Path, model: Model, tmp_path: Path
) -> None:
    from xpatch.exporters import Session

    saved(model, neurons(model, "relu"), tmp_path / "fixes")
    adapter, int8 = tmp_path / "fixes.onnx_adapter", tmp_path / "int8"
    assert run("export", "adapter", tmp_path / "fixes", "--base", base, "--out", adapter).code == 0
    result = run("export", "quantized", base, "--out", int8, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == {"out": str(int8), "bytes": sum(path.stat().st_size for path in int8.iterdir())}
    assert {path.name for path in int8.iterdir()} == {path.name for path in base.iterdir()}
    session, tokens = Session(int8, adapter), {"input_ids": torch.arange(48).view(8, 6) % 20}
    found, plain = (session.run(tokens, xpatch=xpatch.Rows(patches=one))["logits"] for one in ("fixes", "__base__"))
    assert abs(found - plain).max() > 0.01
    again = run("export", "quantized", int8, "--out", tmp_path / "twice")
    assert again.code == 2 and "quantised already" in again.err and not (tmp_path / "twice").exists()
    nowhere = run("export", "quantized", tmp_path / "nowhere", "--out", tmp_path / "twice")
    assert nowhere.code == 2 and "is not an exported base" in nowhere.err


def test_an_adapter_becomes_a_patch_folder_again(
    run: Callable[..., Any], base: Path, model: Model, tmp_path: Path
) -> None:
    saved(model, neurons(model, "relu"), tmp_path / "fixes")
    adapter, back = tmp_path / "fixes.onnx_adapter", tmp_path / "back"
    assert run("export", "adapter", tmp_path / "fixes", "--base", base, "--out", adapter).code == 0
    result = run("import", adapter, "--out", back, "--json")
    assert result.code == 0, result.err
    fixes, again = xpatch.load(tmp_path / "fixes"), xpatch.load(back)
    assert json.loads(result.out)["fingerprint"] == again.fingerprint == fixes.fingerprint
    assert again.base == fixes.base and torch.equal(again.parts["a"].keys, fixes.parts["a"].keys)
    twice = run("import", adapter, "--out", back)
    assert twice.code == 2 and "--overwrite" in twice.err
    assert run("import", adapter, "--out", back, "--overwrite").code == 0
    adapter.write_bytes(adapter.read_bytes()[:100])
    broken = run("import", adapter, "--out", tmp_path / "other")
    assert broken.code == 2 and "damaged" in broken.err and not (tmp_path / "other").exists()


def test_verify_asks_the_bundled_cases(
    run: Callable[..., Any],
    base: Path,
    model: Model,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from xpatch.zoo.verifier import data

    saved(model, neurons(model, "relu"), tmp_path / "fixes")
    few = data.one_claim_per_subject("edit")[:3]
    monkeypatch.setattr(data, "one_claim_per_subject", lambda split: few)
    monkeypatch.chdir(tmp_path)
    words = ("export", "verify", base, model_folder, "fixes", "--cases", "bundled", "--batch-size", 5)
    result = run(*words, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert set(found["all"]["languages"]) == set(data.LANGUAGES)
    texts = {language: {text for claim in few for text in claim.texts[language]} for language in data.LANGUAGES}
    assert {k: one["texts"] for k, one in found["all"]["languages"].items()} == {k: len(v) for k, v in texts.items()}
    (tmp_path / "bundled").write_text('{"id": "1", "text": "Paris is .", "target": "SUPPORTS"}\n', encoding="utf-8")
    own = json.loads(run(*words, "--json").out)  # a file of that name wins
    assert {k: one["texts"] for k, one in own["all"]["languages"].items()} == {"en": 1}


def test_a_checkpoint_is_written_unchecked_when_asked(
    run: Callable[..., Any], model: Model, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpatch.exporters.checkpoints.files import WeightFiles

    saved(model, delta(model), tmp_path / "fixes")
    monkeypatch.setattr(WeightFiles, "change", lambda self, name, how: None)
    words = ("export", "merged", model_folder, tmp_path / "fixes", "--out", tmp_path / "out")
    refused = run(*words)
    assert refused.code == 2 and "does not compute" in refused.err and not (tmp_path / "out").exists()
    assert run(*words, "--no-check").code == 0 and (tmp_path / "out" / "config.json").is_file()
