"""Models whose weights accelerate keeps elsewhere between calls: a patch computes beside its layer, wherever that is."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

import xpatch
from xpatch.patches.identity import identify

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=CPU)


def to_both(model, folder):
    layered = {
        name for name, child in model.named_children() if any(type(m) is torch.nn.ModuleList for m in child.modules())
    }
    places = {name: "disk" if name in layered else "cpu" for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, places, offload_dir=str(folder), main_device="cpu", force_hooks=True)


HOW = {"cpu": to_cpu, "disk": to_disk, "dispatched": to_both}


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "bert-mlm", "gpt2-lm", "llama", "t5"])
@pytest.mark.parametrize("how", HOW)
def test_offloaded_before_or_after(tiny, token_ids, tmp_path, sets_for, patched, logits, how, family):
    model = tiny(family)
    sets = sets_for(model)
    expected_base = logits(model, token_ids)
    expected = logits(patched(copy.deepcopy(model), sets), token_ids)
    before, after = copy.deepcopy(model), model
    patched(before, sets)
    HOW[how](before, tmp_path / "before")
    HOW[how](after, tmp_path / "after")
    patched(after, sets)  # the base is compared through accelerate's map
    for one in (before, after):
        assert any(parameter.is_meta for parameter in one.parameters())
        for _ in range(2):
            assert torch.equal(logits(one, token_ids), expected)
        assert any(parameter.is_meta for parameter in one.parameters())
        rows = logits(one, token_ids, xpatch=xpatch.Rows(patches=["__base__", None, "deltas"]))
        assert torch.equal(rows[0], expected_base[0]) and torch.equal(rows[1], expected[1])
        xpatch.remove(one)
        assert torch.equal(logits(one, token_ids), expected_base)
        accelerate.hooks.remove_hook_from_submodules(one)


@pytest.mark.parametrize("family", ["bert", "bert-mlm", "gpt2-lm", "llama", "t5"])
@pytest.mark.parametrize("how", HOW)
def test_an_offloaded_base_is_the_same_base(tiny, tmp_path, family, how):
    model = tiny(family)
    site = [site.name for site in xpatch.models.anatomy.find_ffn_sites(model)]
    before = identify(model, site=site)
    HOW[how](model, tmp_path)
    assert identify(model, site=site) == before


@pytest.mark.parametrize("how", HOW)
def test_another_offloaded_base_is_told(tiny, tmp_path, sets_for, how):
    sets, model = sets_for(tiny("bert")), tiny("bert")
    HOW[how](model, tmp_path)
    with pytest.raises(xpatch.MismatchError, match=r"weights of layer bert\.encoder\.layer\.0"):
        xpatch.apply(model, sets["neurons"])


def test_untied_equal_weights_stay_two(tiny, tmp_path):
    model = tiny("llama")  # nothing is tied, and all norms are ones
    layer = model.model.layers
    with torch.no_grad():
        layer[1].mlp.up_proj.weight.copy_(layer[0].mlp.up_proj.weight)
    before = identify(model)
    to_cpu(model, tmp_path)
    assert identify(model) == before


def test_weights_that_went_missing_are_told(tiny, tmp_path, sets_for):
    model = tiny("bert")
    sets = sets_for(model)
    to_disk(model, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(xpatch.MismatchError, match="expected its values where accelerate offloaded them"):
        xpatch.apply(model, sets["neurons"])


@torch.no_grad()
def test_a_model_loaded_with_a_device_map(tiny, token_ids, tmp_path, sets_for, patched, logits):
    """As `from_pretrained(..., device_map=...)` does: the weights on disk are those of the checkpoint."""
    model = tiny("llama")
    sets = sets_for(model)
    expected = logits(patched(copy.deepcopy(model), sets), token_ids)
    model.save_pretrained(tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    loaded = (
        type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload").eval()
    )
    assert loaded.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(patched(loaded, sets), token_ids), expected)
    with pytest.warns(UserWarning) as told:
        loaded.save_pretrained(tmp_path / "again")
    assert any("without its patches" in str(warning.message) for warning in told)
    saved = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert saved == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert [
        entry["name"] for entry in json.loads((tmp_path / "again" / "xpatch_applied.json").read_text())["sets"]
    ] == list(sets)


def test_an_offloaded_site_cannot_be_captured(tiny, tmp_path):
    model = tiny("bert")
    to_cpu(model, tmp_path)
    with pytest.raises(xpatch.ConflictError, match="offloaded"):
        xpatch.prepare(model, capacity=4)
    assert xpatch.runtime.attach.runtime_of(model) is None
