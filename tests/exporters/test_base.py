"""Exporting a base: what is written, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import json
import sys

import onnx
import pytest
import torch

import xpatch
from tests.exporters.conftest import SIZES, batch, bert, close, neurons, torch_logits, transformers
from xpatch.exporters import Session, export_base, read_base
from xpatch.exporters.slots import prefixes


def test_what_is_in_the_folder(bert_base):
    assert sorted(path.name for path in bert_base.folder.iterdir()) == ["model.onnx", "xpatch_onnx.json"]
    base = read_base(bert_base.folder)
    assert base.architecture == "BertForSequenceClassification" and base.activation == "relu"
    assert base.inputs == ("input_ids", "attention_mask", "token_type_ids") and base.labels == ("LABEL_0", "LABEL_1")
    assert [(slot.kind, slot.site) for slot in base.slots] == [("neurons", bert_base.site), ("lowrank", bert_base.down)]
    assert base.identity == bert_base.base


def test_patch_inputs_are_optional_and_base_weights_constant(bert_base):
    graph = onnx.load(str(bert_base.folder / "model.onnx")).graph
    base = read_base(bert_base.folder)
    inputs, initializers = {value.name for value in graph.input}, {value.name for value in graph.initializer}
    assert inputs == {*base.inputs, *base.optional_inputs}
    assert inputs & initializers == base.optional_inputs
    assert all(name == name.lower() for name in base.optional_inputs)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    prefix = base.slots[0].prefix
    assert shapes[f"{prefix}_keys"] == [32, f"{prefix}_n"]
    assert shapes[f"{prefix}_bias"] == [f"{prefix}_n"] and shapes[f"{prefix}_values"] == [f"{prefix}_n", 32]
    domains = {node.domain for node in graph.node}
    assert domains <= {"", "ai.onnx"}


def test_the_model_stays_as_it_was_and_the_folder_is_replaced(tmp_path):
    model = bert()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "xpatch_onnx.json").write_text("from an earlier export, as is the next file")
    (tmp_path / "onnx" / "stale.txt").write_text("")
    export_base(model, tmp_path / "onnx", languages=())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.onnx", "onnx", "xpatch_onnx.json"]
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    base = read_base(tmp_path / "onnx")
    assert not any("mask" in name or "language" in name for name in base.optional_inputs)
    model.eval()
    inputs, patches = batch(), xpatch.PatchSet(parts={"n": neurons("bert.encoder.layer.1", 3)})
    found = Session(tmp_path / "onnx", patches).run(inputs, xpatch=xpatch.Rows(languages="en"))["logits"]
    assert close(found, torch_logits(model, inputs, patches))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.slow
def test_other_activations(activation, tmp_path):
    model = bert()
    export_base(model, tmp_path / "onnx", activation=activation)
    inputs = batch()
    patches = xpatch.PatchSet(parts={"n": neurons("bert.encoder.layer.1", 5, activation)})
    found = Session(tmp_path / "onnx", patches).run(inputs)["logits"]
    assert close(found, torch_logits(model, inputs, patches))


@pytest.mark.slow
def test_gpt2_and_a_masked_lm(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    models = {
        "transformer.h.1.mlp": transformers.GPT2ForSequenceClassification(config).eval(),
        "bert.encoder.layer.1": transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval(),
    }
    for site, model in models.items():
        export_base(model, tmp_path / site)
        inputs, patches = batch(), xpatch.PatchSet(parts={"n": neurons(site, 5)})
        session = Session(tmp_path / site, patches)
        assert close(session.run(inputs)["logits"], torch_logits(model, inputs, patches)), site
        assert close(
            session.run(inputs, xpatch=xpatch.Rows(patches="__base__"))["logits"], torch_logits(model, inputs)
        ), site


def test_a_failed_export_leaves_the_earlier_one(bert_base, tmp_path, monkeypatch):
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "xpatch_onnx.json").write_text("{}")

    def fail(model, call, slots, temporary, opset, reader):
        (temporary / "model.onnx").write_text("half")
        raise xpatch.BackendError("no")

    monkeypatch.setattr("xpatch.exporters.base.trace", fail)
    with pytest.raises(xpatch.BackendError):
        export_base(bert_base.model, folder)
    assert (folder / "xpatch_onnx.json").read_text() == "{}"
    assert [path.name for path in tmp_path.rglob("*")] == ["onnx", "xpatch_onnx.json"]


@pytest.mark.slow
def test_weights_beside_the_graph(bert_base, tmp_path, monkeypatch):
    """What protobuf's limit of 2 GiB does to large models."""
    monkeypatch.setattr("xpatch.exporters.trace._LARGE", 0)
    export_base(bert_base.model, tmp_path / "onnx")
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "xpatch_onnx.json",
    }
    inputs, patches = batch(), xpatch.PatchSet(parts={"n": neurons(bert_base.site, 3)})
    found = Session(tmp_path / "onnx", patches).run(inputs)["logits"]
    assert close(found, torch_logits(bert_base.model, inputs, patches))


def test_what_is_refused(bert_base, tmp_path):
    model = bert()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(xpatch.XpatchError, match="holds files of something else"):
        export_base(model, tmp_path / "full")
    with pytest.raises(xpatch.XpatchError, match="is a file; name a folder"):
        export_base(model, tmp_path / "full" / "thesis.tex")
    with pytest.raises(xpatch.MismatchError, match="no FFN named 'nowhere'"):
        export_base(model, tmp_path / "x", sites=["nowhere"])
    with pytest.raises(xpatch.MismatchError, match="unknown activation 'tanh'"):
        export_base(model, tmp_path / "x", activation="tanh")
    with pytest.raises(xpatch.MismatchError, match="cannot be called on|expected fp32 inputs"):
        export_base(model, tmp_path / "x", linears=["bert.pooler.dense"])
    with pytest.raises(xpatch.MismatchError, match="expected fp32 weights, found torch.bfloat16"):
        export_base(bert().bfloat16(), tmp_path / "x")
    xpatch.apply(model, xpatch.PatchSet(parts={"n": neurons(bert_base.site, 1)}), name="p")
    with pytest.raises(xpatch.ConflictError, match="has patches applied .*xpatch.remove"):
        export_base(model, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_missing_package(bert_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(xpatch.BackendError, match=r"'onnx', .*pip install \"xpatch\[onnx\]\""):
        export_base(bert_base.model, tmp_path / "x")


def test_a_damaged_base(bert_base, tmp_path):
    with pytest.raises(xpatch.FormatError, match="is not an exported base"):
        read_base(tmp_path)
    text = (bert_base.folder / "xpatch_onnx.json").read_text()
    graph = (bert_base.folder / "model.onnx").read_bytes()

    def refused(message, config=text, model=graph):
        (tmp_path / "xpatch_onnx.json").write_text(config)
        (tmp_path / "model.onnx").write_bytes(model)
        with pytest.raises(xpatch.FormatError, match=message):
            Session(tmp_path)

    refused("cannot be read", config=text[:100])
    refused("expected format version 1, found 2", config=json.dumps({**json.loads(text), "version": 2}))
    refused("slots: .*export the base again", config=json.dumps({**json.loads(text), "slots": 3}))
    refused("not of one export", config=json.dumps({**json.loads(text), "architecture": "Other"}))
    refused("cannot be opened by ONNX Runtime", model=graph[: len(graph) // 2])


def test_graph_names():
    assert prefixes(["bert.encoder.layer.3", "A-b", "a.b"]) == [
        "xpatch_bert_encoder_layer_3",
        "xpatch_a_b",
        "xpatch_a_b_2",
    ]


def test_importing_needs_no_onnx():
    import subprocess

    code = "import sys, xpatch.exporters; print([m for m in ('onnx', 'onnxruntime', 'onnxscript', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
