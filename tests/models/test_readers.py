from __future__ import annotations

import pytest
import torch
from torch import nn

import xpatch
from xpatch.errors import ConflictError, MismatchError
from xpatch.models import capture
from xpatch.models.readers import Kept, every_row, is_every_row_asked_for, reader_of


@pytest.mark.parametrize(
    ("family", "reads", "segments"),
    [
        ("bert", "first", ["attention.self.query", "attention.output output"]),
        ("xlm-r", "first", ["attention.self.query", "attention.output output"]),
        ("distilbert", "first", ["attention.q_lin", "attention.out_lin", "sa_layer_norm output_layer_norm"]),
        ("gpt2", "last", ["attn.c_proj", "mlp"]),
        ("llama", "kept", ["self_attn.o_proj", "self_attn.q_proj", "mlp"]),
        ("phi3", "kept", ["self_attn.o_proj", "mlp"]),
        ("gpt-neox", "kept", ["attention.dense", "mlp"]),
    ],
)
def test_readers_by_family(tiny, family, reads, segments):
    model = tiny(family, layers=3)
    reader = reader_of(model)
    found = [" ".join(dict.fromkeys([segment.narrow, segment.widen])) for segment in reader.segments]
    assert reader.reads == reads and reader.layer.endswith(".2")
    assert [name.replace(f"{reader.layer}.", "") for name in found] == segments


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("bert-mlm", "found a BertForMaskedLM"),
        ("t5", "found a T5ForConditionalGeneration"),
        ("mixtral", "model type 'mixtral', whose layers are not known"),
        ("modernbert", "classifier of model type 'modernbert'"),
        ("deberta-v2", "classifier of model type 'deberta-v2'"),
        ("mamba", "model type 'mamba'"),
    ],
)
def test_other_models_are_named(tiny, family, found):
    with pytest.raises(MismatchError, match=rf"{found}.* Known are .*bert, .*gpt2, .*leave this model as it is"):
        xpatch.optimize(tiny(family))


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering", "MultipleChoice", "PreTraining"])
def test_other_heads_are_named(tiny, head):
    import transformers as hf

    model = getattr(hf, f"BertFor{head}")(tiny("bert").config)
    with pytest.raises(MismatchError, match=f"found a BertFor{head}"):
        xpatch.optimize(model)


def mean_pooled(model):
    class Mean(nn.Module):
        def forward(self, hidden):
            return hidden.mean(1)

    model.bert.pooler = Mean()


def averaged(model):
    model.bert.pooler = nn.Sequential(nn.AdaptiveAvgPool2d((1, 32)), nn.Flatten())


def own_forward(model):
    model.forward = lambda ids: model.bert(ids)[0].mean(1)


def own_class(model):
    def forward(self, ids):
        return self.bert(ids)[0].mean(1)

    model.__class__ = type(
        "MeanForSequenceClassification", (type(model),), {"forward": forward, "__module__": __name__}
    )


def chunked(model):
    model.bert.encoder.layer[1].chunk_size_feed_forward = 2


def deeper(model):
    model.config.num_hidden_layers = 3


def cross(model):
    model.bert.encoder.layer[1].crossattention = nn.Linear(2, 2)


@pytest.mark.parametrize("change", [mean_pooled, averaged, own_forward, own_class, chunked, deeper, cross])
def test_models_that_are_not_quite_their_family_are_refused(tiny, change):
    model = tiny("bert")
    change(model)
    with pytest.raises(MismatchError, match="optimize: which rows the head of"):
        xpatch.optimize(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_heads_of_linear_layers_may_be_replaced(tiny):
    model = tiny("gpt2")
    model.score = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 2))
    assert reader_of(model).reads == "last"


def test_a_script_module_and_a_value_that_is_no_model(tiny):
    model = tiny("bert")
    model.extra = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ConflictError, match="TorchScript"):
        xpatch.optimize(model)
    with pytest.raises(MismatchError, match=r"optimize\(model\): expected a torch.nn.Module; found str"):
        xpatch.optimize("bert")


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(0, 1), [[0], [0], [0]]),
        (slice(-1, None), [[4], [4], [4]]),
        (slice(-3, None), [[2, 3, 4]] * 3),
        (torch.tensor([1, -1, 2]), [[1, 4, 2]] * 3),
        (torch.tensor([[3], [0], [4]]), [[3], [0], [4]]),
    ],
)
def test_kept_rows_return_to_their_places(index, rows):
    x = torch.randn(3, 5, 2)
    kept = Kept(torch.zeros(3, 5), len(rows[0]), index)
    narrow = kept.narrow(x)
    assert torch.equal(narrow, torch.stack([x[item, rows[item]] for item in range(3)]))
    assert kept.fits(x) and kept.is_narrow(narrow) and not kept.fits(narrow) and not kept.is_narrow(x)
    wide = kept.widen(narrow)
    assert wide.shape == x.shape and wide.is_contiguous()
    assert all(torch.equal(wide[item, rows[item]], x[item, rows[item]]) for item in range(3))


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_capture_sees_every_row_of_an_optimised_model(tiny, token_ids, family):
    model = tiny(family)
    before = capture(model, {"input_ids": token_ids})
    found = capture(xpatch.optimize(model), {"input_ids": token_ids})
    for name in ("x", "residual", "base", "logits"):
        assert torch.equal(getattr(found, name), getattr(before, name))
    with every_row():
        assert is_every_row_asked_for()
    assert not is_every_row_asked_for()
