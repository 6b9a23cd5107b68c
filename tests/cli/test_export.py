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
