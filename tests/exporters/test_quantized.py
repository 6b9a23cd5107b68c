"""Bases in int8: smaller, near the fp32 base, and patched exactly as it is."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import onnx
import pytest
import torch

import xpatch
from tests.exporters.conftest import batch, close, lowrank, masks, neurons, torch_logits, transformers
from xpatch.exporters import Session, export_adapter, export_base, quantize_base, read_base
from xpatch.exporters.embeddings import quantize_rows


@pytest.fixture(scope="module")
def quantized(bert_base, tmp_path_factory):
    return quantize_base(bert_base.folder, tmp_path_factory.mktemp("int8") / "bert")


def patch_set(base, **more):
    return xpatch.PatchSet(
        parts={"n": neurons(base.site, 5, mask="m"), "d": lowrank(base.down, 2)},
        masks={"m": masks("en", "zh")},
        base=base.base,
        **more,
    )


def graph_of(folder):
    return onnx.load(str(folder / "model.onnx")).graph


def slot_nodes(graph):
    slots = [node for node in graph.node if node.name.startswith("xpatch_bert_")]
    return sorted((node.op_type, list(node.input), list(node.output)) for node in slots)


def test_the_graph_is_int8_but_its_slots_are_as_they_were(bert_base, quantized):
    fp32, int8 = graph_of(bert_base.folder), graph_of(quantized)
    base, made = read_base(bert_base.folder), read_base(quantized)
    assert base.quantized is None and made.quantized == "int8"
    assert made.slots == base.slots and made.identity == base.identity and made.digest != base.digest
    own = [t for t in int8.initializer if t.name not in made.optional_inputs]
    weights = [t for t in own if len(t.dims) == 2 and min(t.dims) > 1]
    assert len(weights) == 3 + 2 * 6 + 2 and {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    scales = [t for t in int8.initializer if t.name.endswith("_scale") and len(t.dims) == 1 and t.dims[0] == 32]
    assert len(scales) == 2 * 5 + 1  # one for each output channel: attention, down projection, pooler
    for graph in (fp32, int8):
        inputs, initializers = {v.name for v in graph.input}, {t.name: t for t in graph.initializer}
        assert {*made.inputs, *made.optional_inputs} == inputs and inputs & set(initializers) == made.optional_inputs
        assert initializers[made.slots[0].name("keys")].data_type == onnx.TensorProto.FLOAT
    assert slot_nodes(fp32) and slot_nodes(fp32) == slot_nodes(int8)
    assert {node.domain for node in int8.node} <= {"", "ai.onnx"}  # runs in any ONNX Runtime
    assert (quantized / "model.onnx").stat().st_size < (bert_base.folder / "model.onnx").stat().st_size


def test_it_answers_nearly_as_the_model_and_patches_act_in_fp32(bert_base, quantized):
    inputs, rows = batch(), xpatch.Rows(languages=["en", "zh", "en", "none"])
    patches = patch_set(bert_base, name="fixes")
    session = Session(quantized, patches)
    plain, patched = torch_logits(bert_base.model, inputs), torch_logits(bert_base.model, inputs, patches, rows=rows)
    moved = np.abs(patched - plain).max()
    base = session.run(inputs, xpatch=xpatch.Rows(patches="__base__"))["logits"]
    found = session.run(inputs, xpatch=rows)["logits"]
    assert 1e-4 < np.abs(base - plain).max() < 0.1 * moved and np.abs(found - patched).max() < 0.1 * moved
    with session.disabled():
        assert np.array_equal(session.run(inputs)["logits"], base)
    chosen = xpatch.Rows(patches=["fixes", "__base__", "fixes", "__base__"], languages=["en", "zh", "en", "none"])
    mixed = session.run(inputs, xpatch=chosen)["logits"]
    # not the same bits: what goes into a layer is scaled by the whole batch, in which other rows are patched now
    assert close(mixed[[0, 2]], found[[0, 2]], 0.1 * moved) and close(mixed[[1, 3]], base[[1, 3]], 0.1 * moved)
    session.remove("fixes")
    assert np.array_equal(session.run(inputs)["logits"], base)


def test_an_empty_set_and_an_adapter_made_for_the_fp32_base(bert_base, quantized, tmp_path):
    inputs = batch()
    session = Session(quantized, xpatch.PatchSet(parts={"n": neurons(bert_base.site, 0)}, base=bert_base.base))
    assert close(session.run(inputs)["logits"], Session(quantized).run(inputs)["logits"])
    patches = patch_set(bert_base)
    one = export_adapter(patches, bert_base.folder, tmp_path / "one.onnx_adapter")
    other = export_adapter(patches, quantized, tmp_path / "other.onnx_adapter")
    assert one.read_bytes() == other.read_bytes()
    choice = xpatch.Rows(languages="zh")
    found = Session(quantized, one).run(inputs, xpatch=choice)["logits"]
    assert close(found, Session(quantized, patches).run(inputs, xpatch=choice)["logits"])


def test_weights_beside_the_graph(bert_base, quantized, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(bert_base.folder, large)
    (large / "model.onnx").unlink()
    model = onnx.load(str(bert_base.folder / "model.onnx"))
    onnx.save(
        model, str(large / "model.onnx"), save_as_external_data=True, location="model.onnx.data", size_threshold=100
    )
    (large / "tokenizer.json").write_text("{}")
    folder = quantize_base(large, tmp_path / "out")
    names = ["model.onnx", "model.onnx.data", "tokenizer.json", "xpatch_onnx.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "model.onnx.data").stat().st_size < (large / "model.onnx.data").stat().st_size / 2
    inputs, patches, choice = batch(), patch_set(bert_base), xpatch.Rows(languages="en")
    found, expected = (Session(one, patches).run(inputs, xpatch=choice)["logits"] for one in (folder, quantized))
    assert np.array_equal(found, expected)
    (large / "model.onnx.data").unlink()
    with pytest.raises(xpatch.FormatError, match=r"the weights beside it cannot be read"):
        quantize_base(large, tmp_path / "no")


@pytest.mark.slow
def test_a_decoder_and_an_encoder_decoder(tmp_path):
    t = transformers
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    models = [
        t.GPT2LMHeadModel(t.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=40, initializer_range=0.2)),
        t.MT5ForConditionalGeneration(
            t.MT5Config(vocab_size=60, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0)
        ),
    ]
    for number, model in enumerate(models):
        model.eval()
        base = export_base(model, tmp_path / f"fp32-{number}")
        folder = quantize_base(base, tmp_path / f"int8-{number}")
        assert {p.name for p in folder.iterdir()} == {p.name for p in base.iterdir()}
        slot = read_base(folder).slots[0]
        patches = xpatch.PatchSet(parts={"n": neurons(slot.site, 3, scale=5.0)})
        ids = torch.randint(3, 60, (2, 6))
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if number else {})}
        outputs = {}
        for name, one in (("fp32", base), ("int8", folder)):
            session = Session(one, {"p": patches})
            outputs[name] = (
                session.run(inputs)["logits"],
                session.run(inputs, xpatch=xpatch.Rows(patches="__base__"))["logits"],
            )
        moved = np.abs(outputs["fp32"][0] - outputs["fp32"][1]).max()
        for fp32, int8 in zip(outputs["fp32"], outputs["int8"], strict=True):
            assert np.abs(fp32 - int8).max() < 0.25 * moved


def test_what_is_refused_leaves_nothing(bert_base, quantized, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refused(error, message, base, target=out):
        with pytest.raises(error, match=message):
            quantize_base(base, target)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    refused(xpatch.FormatError, "is not an exported base", tmp_path)
    refused(xpatch.FormatError, "is not an exported base", tmp_path / "nowhere")
    refused(xpatch.MismatchError, r"is quantised already \(int8\)", quantized)
    refused(xpatch.XpatchError, "is the base itself", bert_base.folder, bert_base.folder)
    damaged = shutil.copytree(bert_base.folder, tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes((damaged / "model.onnx").read_bytes()[:1000])
    refused(xpatch.FormatError, r"model.onnx cannot be read .*export the base again", damaged)
    (damaged / "model.onnx").unlink()
    refused(xpatch.FormatError, r"model.onnx cannot be read", damaged)
    shutil.copyfile(quantized / "model.onnx", damaged / "model.onnx")
    refused(xpatch.FormatError, "not of one export", damaged)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    refused(xpatch.XpatchError, "files of something else", bert_base.folder, tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    refused(xpatch.BackendError, r'needs the package .*pip install "xpatch\[onnx\]"', bert_base.folder)


def test_slots_that_quantising_would_change_are_found(bert_base, tmp_path, monkeypatch):
    """With their empty default tensors slots are constants to the tools: patches would be ignored from then on."""
    from onnxruntime import quantization

    plain = quantization.quantize_dynamic
    monkeypatch.setattr(quantization, "quantize_dynamic", lambda *a, **k: plain(*a, **{**k, "nodes_to_exclude": []}))
    with pytest.raises(xpatch.BackendError, match="changed the patch slots|cannot quantise"):
        quantize_base(bert_base.folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_of_a_table():
    table = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
    table[2], table[3, 5] = 0, 1000
    values, scale = quantize_rows(table)
    assert values.dtype == np.int8 and scale.shape == (7, 1) and np.isfinite(scale).all()
    assert (np.abs(values * scale - table) <= scale / 2 * 1.0001).all() and not values[2].any()


def test_no_trace_of_the_machine_in_a_graph(bert_base, quantized):
    for folder in (bert_base.folder, quantized):
        data = (folder / "model.onnx").read_bytes()
        assert b".py" not in data and b"site-packages" not in data
