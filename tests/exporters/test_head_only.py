"""The last layer for the row the head reads: the same logits, one row a text."""

from __future__ import annotations

import pytest

import xpatch
from tests.exporters.conftest import SIZES, batch, bert, close, lowrank, neurons, torch_logits
from xpatch.exporters import Session, export_base, read_base
from xpatch.models.anatomy import final_ffn

transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=60, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=40, initializer_range=0.2
    )
    return transformers.DistilBertForSequenceClassification(config).eval()


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config).eval()


def llama():
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "pad_token_id": 0})
    return transformers.LlamaForSequenceClassification(config).eval()


def rows_at_slot(folder):
    """How many rows of a text the neuron slot is given, by the graph's own shapes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(folder / "model.onnx")))
    keys = next(value.name for value in model.graph.input if value.name.endswith("keys"))
    read = next(node.output[0] for node in model.graph.node if keys in node.input)
    shape = next(value for value in model.graph.value_info if value.name == read).type.tensor_type.shape
    return shape.dim[1].dim_value or shape.dim[1].dim_param


@pytest.mark.parametrize(
    "make", [bert, *(pytest.param(make, marks=pytest.mark.slow) for make in (distilbert, gpt2, llama))]
)
def test_the_read_row_alone_gives_the_same_logits(make, tmp_path):
    model = make()
    site = final_ffn(model)
    inside = 128 if make is gpt2 else 64
    patches = xpatch.PatchSet(
        parts={"n": neurons(site.name, 5), "d": lowrank(site.down, 2, inside=inside)}, name="fixes"
    )
    inputs = batch()
    expected, plain = torch_logits(model, inputs, patches), torch_logits(model, inputs)
    assert not close(expected, plain, 1e-2)
    for head_only in (True, False):
        folder = export_base(model, tmp_path / str(head_only), head_only=head_only)
        assert read_base(folder).head_only == head_only
        assert (rows_at_slot(folder) == 1) == head_only
        session = Session(folder, patches)
        assert close(session.run(inputs)["logits"], expected)
        with session.disabled():
            assert close(session.run(inputs)["logits"], plain)
        one = {name: value[:1, :1] for name, value in inputs.items()}  # a text of one token
        assert close(session.run(one)["logits"], torch_logits(model, one, patches))


@pytest.mark.slow
def test_a_masked_language_model_keeps_every_row(tmp_path):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    assert not read_base(export_base(model, tmp_path / "onnx")).head_only
