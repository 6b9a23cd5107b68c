"""Saving a patched model: the base's weights byte for byte, and a word about the patches that are not among them."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch

import xpatch
from xpatch.runtime.saving import HINT_FILE

FAMILIES = ("bert", "gpt2-lm", "llama", "t5")


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_base_byte_for_byte(
    tiny, token_ids, tmp_path, sets_for, patched, logits, no_trace, family
):
    model = tiny(family)
    base, sets = copy.deepcopy(model), sets_for(model)
    base.save_pretrained(tmp_path / "base")
    patched(model, sets)
    with torch.no_grad():
        found = logits(model, token_ids)
    with pytest.warns(UserWarning, match=r"without its patches \('neurons', 'deltas'\)") as told:
        model.save_pretrained(tmp_path / "patched")
    assert told[0].filename == __file__  # the line of the user's code
    written = files(tmp_path / "patched")
    hint = json.loads(written.pop(HINT_FILE))
    assert written == files(tmp_path / "base")
    assert [(entry["name"], entry["fingerprint"], entry["edits"]) for entry in hint["sets"]] == [
        (name, patches.fingerprint, 0) for name, patches in sets.items()
    ]

    again = type(model).from_pretrained(tmp_path / "patched").eval()
    assert not xpatch.status(again).names
    no_trace(copy.deepcopy(again), base, token_ids)
    with torch.no_grad():
        torch.testing.assert_close(logits(patched(again, sets), token_ids), found, atol=0, rtol=0)
    no_trace(model, base, token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_dict_is_the_bases_and_loads_while_patches_are_on(
    tiny, token_ids, sets_for, patched, side_path, logits, no_trace, family
):
    model, other = tiny(family), tiny(family)
    sets = sets_for(model, base=False)
    patched(model, sets)
    keys = other.state_dict().keys()
    assert model.state_dict().keys() == keys
    model.load_state_dict(other.state_dict())  # other weights: the same patches beside them
    with torch.no_grad():
        torch.testing.assert_close(
            logits(model, token_ids), logits(side_path(other, sets), token_ids).float(), atol=1e-3, rtol=1e-3
        )
    no_trace(model, other, token_ids)


def test_a_set_that_belongs_to_the_loaded_weights_is_checked_again(tiny, sets_for):
    model, other = tiny("bert"), tiny("bert")
    sets = sets_for(model)
    xpatch.apply(model, sets["neurons"], name="a")
    model.load_state_dict(other.state_dict())
    with pytest.raises(xpatch.MismatchError, match=r"weights of layer bert\.encoder\.layer\.0"):
        xpatch.apply(model, sets["neurons"], name="a")


@pytest.mark.parametrize("kind", [str, Path])
def test_the_hint_is_always_about_the_latest_save(tiny, tmp_path, sets_for, kind):
    model, folder = xpatch.prepare(tiny("bert")), kind(tmp_path)
    sets = sets_for(model)

    def saved():
        model.save_pretrained(folder)
        assert not [name for name in os.listdir(folder) if name.endswith(".new")]
        path = tmp_path / HINT_FILE
        return [entry["name"] for entry in json.loads(path.read_text())["sets"]] if path.exists() else None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert saved() is None
        xpatch.apply(model, sets["neurons"], name="ä")
        assert saved() == ["ä"]
        xpatch.apply(model, sets["deltas"], name="b")
        assert saved() == ["ä", "b"]
        xpatch.remove(model, "ä")
        assert saved() == ["b"]
    xpatch.remove(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved() is None


def test_a_folder_that_cannot_be_made_gets_no_hint_and_no_warning(tiny, tmp_path, sets_for):
    model = tiny("bert")
    xpatch.apply(model, sets_for(model)["neurons"], name="a")
    (tmp_path / "file").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "file")  # transformers logs an error and returns
    assert files(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("how", ["keyword", "position"])
def test_only_the_main_process_writes_the_hint(tiny, tmp_path, sets_for, how):
    model = tiny("bert")
    xpatch.apply(model, sets_for(model)["neurons"], name="a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "keyword":
            model.save_pretrained(tmp_path, is_main_process=False)
        else:
            model.save_pretrained(tmp_path, False)
    assert HINT_FILE not in files(tmp_path)


def test_sharded_and_cast_states_pass_through(tiny, tmp_path, sets_for):
    model = tiny("gpt2-lm")
    base = copy.deepcopy(model)
    xpatch.apply(model, sets_for(model)["deltas"], name="a")
    half = {key: tensor.half() for key, tensor in base.state_dict().items()}
    for one, folder in ((base, "base"), (model, "patched")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.save_pretrained(tmp_path / folder, state_dict=dict(half), max_shard_size="40KB")
    written = files(tmp_path / "patched")
    assert written.pop(HINT_FILE) and written == files(tmp_path / "base")
    assert len([name for name in written if name.startswith("model-")]) > 1


def test_pushing_uploads_the_base_and_the_hint(tiny, tmp_path, monkeypatch, sets_for):
    import huggingface_hub

    uploads = []

    class Repo(str):
        repo_id = property(str)

    def commit(self, repo_id, operations, **ignored):
        uploads.append(
            {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **ignored: Repo(name))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda *ignored, **kwargs: huggingface_hub.ModelCard(""))
    model = tiny("bert")
    model.save_pretrained(tmp_path / "base")
    xpatch.apply(model, sets_for(model)["neurons"], name="a")
    with pytest.warns(UserWarning, match="without its patches"):
        model.push_to_hub("someone/something")
    with pytest.warns(UserWarning, match="without its patches"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="someone/something")
    base = files(tmp_path / "base")
    pushed, saved_and_pushed = uploads
    assert json.loads(pushed.pop(HINT_FILE))["sets"][0]["name"] == "a"
    assert {name: pushed[name] for name in base} == base
    saved_and_pushed.pop("README.md")
    assert saved_and_pushed == base  # uploaded before the hint is written; it stays in the folder
    assert HINT_FILE in files(tmp_path / "pushed")


def test_an_accelerator_saves_the_base(tiny, tmp_path, sets_for, patched, no_trace, token_ids):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model)
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        prepared = accelerator.prepare(model)
        patched(prepared, sets)
        plain = accelerator.unwrap_model(prepared)
        with pytest.warns(UserWarning, match="without its patches"):
            plain.save_pretrained(
                tmp_path / "patched", is_main_process=accelerator.is_main_process, save_function=accelerator.save
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accelerator.save_state(tmp_path / "state")
        base.save_pretrained(tmp_path / "base")
        written = files(tmp_path / "patched")
        assert written.pop(HINT_FILE) and written == files(tmp_path / "base")
        state = next(path for path in (tmp_path / "state").iterdir() if path.suffix == ".safetensors")
        assert state.read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
        no_trace(plain, base, token_ids)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
