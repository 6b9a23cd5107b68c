"""A set for a base that was checked before is taken quickly, and only as long as the model is what was checked."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.patches import digests, fits
from xpatch.patches.identity import check_fit, identify
from xpatch.patches.types import PatchSet


@pytest.fixture
def hashed(monkeypatch):
    """How many times the weights of a model were looked at."""
    calls = []
    real = digests.of_tensors
    monkeypatch.setattr(digests, "of_tensors", lambda model: calls.append(1) or real(model))
    return calls


def test_the_second_set_of_one_base_is_not_compared_weight_by_weight(tiny, hashed):
    model = tiny("bert")
    one, two = (PatchSet(parts={}, base=identify(model)) for _ in range(2))
    hashed.clear()
    for patches in (one, two, one):
        check_fit(patches, model)
    assert len(hashed) == 1
    check_fit(two, model, allow=("head",))  # another way of looking is another check
    assert len(hashed) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.classifier.bias.add_(1),
        lambda model: setattr(model.classifier, "weight", nn.Parameter(torch.randn(2, 32))),
        lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items() if v.is_floating_point()}, strict=False),
        lambda model: setattr(model, "classifier", nn.Linear(32, 2)),
        lambda model: model.config.id2label.update({0: "other"}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_changed_model_is_looked_at_again(tiny, change):
    model = tiny("bert")
    patches = PatchSet(parts={}, base=identify(model))
    check_fit(patches, model)
    change(model)
    with pytest.raises(MismatchError, match="do not fit"):
        check_fit(patches, model)


@torch.no_grad()
def test_beside_a_served_set_of_the_same_base_the_touched_layer_and_the_head_are_looked_at(tiny):
    model = tiny("bert")
    patches = PatchSet(parts={}, base=identify(model, site="bert.encoder.layer.1"))
    check_fit(patches, model)
    model.bert.embeddings.word_embeddings.weight.add_(1)
    check_fit(patches, model, served=[patches])
    with pytest.raises(MismatchError, match="weights in fp32"):
        check_fit(patches, model, served=[PatchSet(parts={})])
    with pytest.raises(MismatchError, match="weights in fp32"):
        check_fit(patches, model)
    for name in ("bert.encoder.layer.1.output.dense.bias", "classifier.bias", "bert.pooler.dense.weight"):
        model = tiny("bert")
        patches = PatchSet(parts={}, base=identify(model, site="bert.encoder.layer.1"))
        check_fit(patches, model)
        model.get_parameter(name).add_(1)
        with pytest.raises(MismatchError, match="do not fit"):
            check_fit(patches, model, served=[patches])


def test_another_precision_is_looked_at_again(tiny, hashed):
    model = tiny("bert")
    patches = PatchSet(parts={}, base=identify(model))
    check_fit(patches, model)
    hashed.clear()
    check_fit(patches, model.bfloat16())
    assert hashed


def test_nothing_is_kept_alive(tiny):
    model = tiny("bert")
    check_fit(PatchSet(parts={}, base=identify(model)), model)
    weight = weakref.ref(model.classifier.weight)
    model.classifier.weight = nn.Parameter(torch.zeros(2, 32))
    gc.collect()
    assert weight() is None
    del model
    gc.collect()
    assert len(fits._known) == 0 or all(key is not None for key in fits._known)


def test_weights_that_cannot_be_watched_are_hashed_each_time(tiny, hashed):
    with torch.inference_mode():
        model = tiny("bert")
    patches = PatchSet(parts={}, base=identify(model))
    hashed.clear()
    for _ in range(2):
        check_fit(patches, model)
    assert len(hashed) == 2
