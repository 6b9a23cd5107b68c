"""`xpatch inspect --model` on folders of every kind of model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from xpatch.models.anatomy import find_ffn_sites
from xpatch.patches.identity import identify


@pytest.fixture
def saved(tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`saved(family)`: a folder with that model; `weights=False`: with its config.json alone."""

    def save(family: str, *, weights: bool = True, **more: Any) -> Path:
        model, folder = tiny(family, **more), tmp_path / family
        model.config.architectures = [type(model).__name__]
        (model if weights else model.config).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize(
    "family, shown",
    [
        ("bert-mlm", ("BertForMaskedLM", "bert.encoder.layer.1", "encoder", "plain", "intermediate.dense")),
        (
            "mt5",
            ("MT5ForConditionalGeneration", "decoder.block.1.layer.2.DenseReluDense", "gated", "wi_0", "gelu_tanh"),
        ),
        ("llama", ("LlamaForCausalLM", "decoder", "gate_proj", "silu")),
        ("mixtral", ("MixtralForCausalLM", "model.layers.1.mlp", "4 experts")),
        ("albert", ("albert_layers.0", "used 2 times", "family")),
        ("gemma3-vision", ("Gemma3ForConditionalGeneration", "vision", "model.language_model.layers.1.mlp")),
    ],
)
def test_a_config_is_enough(
    run: Callable[..., Any], saved: Callable[..., Path], family: str, shown: tuple[str, ...]
) -> None:
    """No weights are read: there are none."""
    result = run("inspect", "--model", saved(family, weights=False))
    assert result.code == 0, result.err
    for word in shown:
        assert word in result.out


def test_json_holds_every_field(run: Callable[..., Any], saved: Callable[..., Path]) -> None:
    result = run("inspect", "--model", saved("llama", weights=False), "--linears", "--json")
    found = json.loads(result.out)["model"]
    assert (found["class"], found["quantised"]) == ("LlamaForCausalLM", None)
    assert found["parameters"] > 10_000
    site = found["sites"][1]
    assert (site["kind"], site["stack"], site["experts"], site["uses"], site["family"]) == (
        "gated",
        "decoder",
        0,
        1,
        None,
    )
    linears = {item["name"]: item for item in found["linears"]}
    assert linears["model.layers.0.mlp.gate_proj"]["role"] == "gate of model.layers.0.mlp"
    assert linears["model.layers.0.self_attn.q_proj"] == {
        "name": "model.layers.0.self_attn.q_proj", "inside": 32, "outside": 32, "role": None,
    }  # fmt: skip
    assert "lm_head" in linears


def test_linears_are_listed_where_there_is_no_ffn(run: Callable[..., Any], saved: Callable[..., Path]) -> None:
    folder = saved("mamba", weights=False)
    result = run("inspect", "--model", folder)
    assert result.code == 2 and "no FFN was found in MambaForCausalLM" in result.err and result.out == ""
    result = run("inspect", "--model", folder, "--linears")
    assert result.code == 0
    assert "backbone.layers.0.mixer.in_proj" in result.out and "no FFN was found" in result.err


@torch.no_grad()
def test_patches_are_checked_against_the_weights(
    run: Callable[..., Any], saved: Callable[..., Path], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """A decoder in bf16 without a tokenizer, and a masked LM: any class, as the folder has it."""
    from transformers import AutoModelForCausalLM

    folder = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    site = find_ffn_sites(model)[0].name
    part = xpatch.PatchNeurons(site, torch.ones(1, 32), torch.ones(1), torch.ones(1, 32), "relu")
    xpatch.save(xpatch.PatchSet(parts={"p": part}, base=identify(model, site=site)), tmp_path / "fixes")
    result = run("inspect", tmp_path / "fixes", "--model", folder)
    assert result.code == 0, result.err
    assert "fits this model" in result.out
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert run("inspect", tmp_path / "fixes", "--model", tmp_path / "half", "--json").code == 0
    torch.manual_seed(7)
    tiny("llama").save_pretrained(tmp_path / "other")
    result = run("inspect", tmp_path / "fixes", "--model", tmp_path / "other")
    assert result.code == 2 and "do not fit this model" in result.err and result.out == ""


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data = {key: value for key, value in {**data, **changes}.items() if value is not None}
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"architectures": ["MyOwnModel"]}, ("architectures", "MyOwnModel", "find_ffn_sites(model)")),
        ({"model_type": "nonesuch"}, ("config.json", "nonesuch")),
        ({"num_hidden_layers": "many"}, ("config.json",)),
        ({"hidden_size": 30}, ("config.json", "attention heads")),
        ({"vocab_size": -3}, ("config.json", "LlamaForCausalLM")),
    ],
)
def test_wrong_configs(
    run: Callable[..., Any], saved: Callable[..., Path], changes: dict[str, Any], told: tuple[str, ...]
) -> None:
    result = run("inspect", "--model", edit_config(saved("llama", weights=False), **changes))
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    for word in told:
        assert word in result.err


def test_a_config_without_architectures_means_the_bare_model(
    run: Callable[..., Any], saved: Callable[..., Path]
) -> None:
    result = run("inspect", "--model", edit_config(saved("llama", weights=False), architectures=None), "--json")
    assert json.loads(result.out)["model"]["class"] == "LlamaModel"


def test_missing_things(
    run: Callable[..., Any], saved: Callable[..., Path], patch_folder: Path, tmp_path: Path
) -> None:
    assert "does not exist" in run("inspect", "--model", tmp_path / "nowhere").err
    (tmp_path / "empty").mkdir()
    assert "config.json" in run("inspect", "--model", tmp_path / "empty").err
    assert "give --model" in run("inspect", patch_folder, "--linears").err
    result = run("inspect", patch_folder, "--model", saved("bert", weights=False))
    assert result.code == 2 and "cannot be loaded as BertForSequenceClassification" in result.err


def test_the_bundled_model(run: Callable[..., Any]) -> None:
    result = run("inspect", "--model", "verifier")
    assert result.code == 0 and "8,841,602 parameters" in result.out
