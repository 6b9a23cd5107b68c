"""Adapters come back as they were, fit only the base they are for, and are refused when anything in them changed."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch

import xpatch
from tests.exporters.conftest import batch, bert, close, lowrank, masks, neurons, torch_logits
from xpatch.exporters import Session, export_adapter, read_adapter
from xpatch.patches.identity import identify
from xpatch.patches.types import EditRecord


@pytest.fixture
def patches(bert_base):
    request = xpatch.EditRequest(id="a", text="x", target="LABEL_1", parallel={"zh": "十"}, author="me")
    return xpatch.PatchSet(
        parts={
            "neurons.0": neurons(bert_base.site, 3, mask="m"),
            "neurons.1": neurons(bert_base.site, 0, mask="m"),
            "neurons.2": neurons(bert_base.site, 2, mask="m"),
            "delta": lowrank(bert_base.down, 2),
        },
        edits=(
            EditRecord("a", "mpn", "edited", request=request, rows={"neurons.0": (0, 2)}, hyperparameters={"lr": 0.1}),
            EditRecord(
                "b", "mpn", "failed", rows={"neurons.0": (1,), "delta": (0, 1)}, seed=3, created="2026-01-01T00:00:00Z"
            ),
        ),
        masks={"m": masks("zh", "en")},
        base=bert_base.base,
        name="fixes",
    )


@pytest.fixture
def adapter(patches, bert_base, tmp_path):
    return export_adapter(patches, bert_base.folder, tmp_path / "new" / "fixes.onnx_adapter")


def test_round_trip(patches, adapter, bert_base):
    again = read_adapter(adapter)
    assert again.fingerprint == patches.fingerprint
    assert again.name == "fixes" and again.base == patches.base
    assert again.edits[0].request == patches.edits[0].request and again.edits[1].created == patches.edits[1].created
    assert list(again.parts) == list(patches.parts)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in patches.tensors.items())
    assert [path.name for path in adapter.parent.iterdir()] == ["fixes.onnx_adapter"]
    inputs, rows = batch(), xpatch.Rows(languages="zh")
    found = Session(bert_base.folder, [adapter]).run(inputs, xpatch=xpatch.Rows(patches="fixes", languages="zh"))[
        "logits"
    ]
    assert close(found, torch_logits(bert_base.model, inputs, patches, rows=rows))


def test_from_a_patch_folder(patches, bert_base, tmp_path):
    xpatch.save(patches, tmp_path / "fixes")
    path = export_adapter(tmp_path / "fixes", bert_base.folder, tmp_path / "fixes.onnx_adapter")
    assert read_adapter(path).fingerprint == patches.fingerprint
    assert set(Session(bert_base.folder, tmp_path / "fixes").patches) == {"fixes"}


def test_an_empty_set(bert_base, tmp_path):
    empty = xpatch.PatchSet(parts={"n": neurons(bert_base.site, 0)}, base=bert_base.base)
    path = export_adapter(empty, bert_base.folder, tmp_path / "empty.onnx_adapter")
    assert read_adapter(path).fingerprint == empty.fingerprint
    inputs = batch()
    found = Session(bert_base.folder, path).run(inputs)["logits"]
    assert close(found, torch_logits(bert_base.model, inputs))


@pytest.mark.parametrize("cut", [0, 10, 200, -40])
def test_a_truncated_adapter(adapter, cut):
    adapter.write_bytes(adapter.read_bytes()[:cut])
    with pytest.raises(xpatch.FormatError, match=r"fixes.onnx_adapter is damaged"):
        read_adapter(adapter)


def test_a_changed_number(adapter):
    data = bytearray(adapter.read_bytes())
    number = np.float32(read_adapter(adapter).parts["neurons.0"].values[1, 5].item()).tobytes()
    place = bytes(data).index(number)
    data[place] ^= 1
    adapter.write_bytes(data)
    with pytest.raises(xpatch.FormatError, match="does not match its fingerprint"):
        read_adapter(adapter)


def rewritten(path, change):
    parameters = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    arrays = {name: value.numpy().copy() for name, value in parameters.items()}
    change(arrays)
    made = onnxruntime.AdapterFormat()
    made.set_parameters({k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in arrays.items()})
    made.export_adapter(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("xpatch_meta"), "not written by xpatch"),
        (lambda arrays: arrays.update(more=np.zeros(1, np.float32)), "description does not name: more"),
        (lambda arrays: arrays.update(xpatch_meta=np.frombuffer(b"{}", np.uint8).copy()), "is damaged"),
        (lambda arrays: arrays.pop(next(name for name in arrays if name.endswith("_keys"))), "is damaged"),
    ],
)
def test_another_content(adapter, change, message):
    rewritten(adapter, change)
    with pytest.raises(xpatch.FormatError, match=message):
        read_adapter(adapter)


def test_no_adapter_at_all(tmp_path):
    with pytest.raises(xpatch.FormatError, match="does not exist"):
        read_adapter(tmp_path / "none.onnx_adapter")


def test_another_base_is_refused(patches, bert_base, tmp_path):
    foreign = dataclasses.replace(patches, base=identify(bert(seed=5)))
    with pytest.raises(xpatch.MismatchError, match="do not fit this exported base: .*expected .* found"):
        export_adapter(foreign, bert_base.folder, tmp_path / "no.onnx_adapter")
    assert not list(tmp_path.iterdir())
    relaxed = ("layer", "head", "all_weights")
    path = export_adapter(foreign, bert_base.folder, tmp_path / "yes.onnx_adapter", allow=relaxed)
    with pytest.raises(xpatch.MismatchError, match="do not fit this exported base"):
        Session(bert_base.folder, path)
    Session(bert_base.folder, path, allow=relaxed)


def test_forms_without_a_slot(bert_base, tmp_path):
    out = tmp_path / "no.onnx_adapter"

    def refused(message, part, **more):
        with pytest.raises(xpatch.MismatchError, match=message):
            export_adapter(xpatch.PatchSet(parts={"p": part}, **more), bert_base.folder, out)
        assert not list(tmp_path.iterdir())

    refused("expected activation 'relu', .*found 'gelu'; export a base", neurons(bert_base.site, 2, "gelu"))
    refused("no neurons slot there, only .*sites=", neurons("bert.encoder.layer.0", 2))
    refused("no lowrank slot there, only .*linears=", lowrank("bert.pooler.dense", 2))
    refused(r"expected widths \(32, 32\), found \(16, 16\)", neurons(bert_base.site, 2, width=16))
    refused("a dense delta changes all 2048 weights", xpatch.DenseDelta(site=bert_base.down, weight=torch.ones(32, 64)))
    gated = dataclasses.replace(neurons(bert_base.site, 2), gate="g")
    refused("exported bases have no gates", gated, gates={"g": xpatch.Gate("threshold", threshold=1.0)})


def test_different_masks_in_one_slot(bert_base, tmp_path):
    parts = {"p": neurons(bert_base.site, 1, mask="one"), "q": neurons(bert_base.site, 1, mask="two")}
    patches = xpatch.PatchSet(parts=parts, masks={"one": masks("en"), "two": masks("en")})
    with pytest.raises(xpatch.ConflictError, match="one group of language masks"):
        export_adapter(patches, bert_base.folder, tmp_path / "no.onnx_adapter")


def test_out_is_a_folder(patches, bert_base, tmp_path):
    with pytest.raises(xpatch.XpatchError, match="is a folder; name a file"):
        export_adapter(patches, bert_base.folder, tmp_path)
