"""KnowledgeEditor's factors against the dense formula, and its conditioner."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.editors.conftest import model_of, tokenizer_of
from tests.editors.hyper.conftest import probes, signals_of
from xpatch.editors.hyper.network import Condition
from xpatch.editors.hyper.texts import Encoder
from xpatch.editors.ke.config import PRESETS
from xpatch.editors.ke.network import Conditioner, KnowledgeEditor


def network_of(items: Any, model: Any, **settings: Any) -> KnowledgeEditor:
    config = PRESETS["default"].model_copy(update={"hidden": 8, "condition": 12, "max_scale": 3.0, **settings})
    return KnowledgeEditor(items, model.get_input_embeddings().weight, config).eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2"], indirect=True)
def test_factors_equal_the_dense_formula(model: Any, tokenizer: Any, kind: str) -> None:
    texts, labels = probes(), [0, 1, 2]
    items, signals = signals_of(model, tokenizer, texts, labels, matrices="all")
    network = network_of(items, model)
    condition = Condition(Encoder(model, tokenizer)(texts), ["en"] * 3)
    found = network(signals, condition)
    h = network.conditioner(condition.tokens)
    for item, head in zip(items, network.heads, strict=True):
        raw = head.second(torch.tanh(head.first(h)))
        seen = signals[item.name]
        for edit in range(3):
            c_a, r_a, c_b, r_b, s = raw[edit].split([item.inside, item.outside, item.inside, item.outside, 1])
            mine = seen.owner == edit
            gradient = seen.delta[mine].T @ seen.x[mine]
            a, b = torch.outer(r_a.softmax(0), c_a), torch.outer(r_b.softmax(0), c_b)
            dense = 3.0 * s.sigmoid() * (gradient * a + b)
            assert torch.allclose(found[item.name].dense(edit), dense, atol=1e-5)
            assert len(found[item.name].of(edit).down) == int(mine.sum()) + 1  # rank at most T + 1


def test_the_condition_does_not_depend_on_padding_or_neighbours() -> None:
    torch.manual_seed(0)
    conditioner = Conditioner(torch.randn(20, 6), 5, 7, trained=False)
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    both = conditioner({"input_ids": ids, "attention_mask": mask})
    assert both.shape == (2, 7)
    single = conditioner({"input_ids": ids[:1, :3], "attention_mask": mask[:1, :3]})
    left = conditioner({"input_ids": ids[:1].roll(2, 1), "attention_mask": mask[:1].roll(2, 1)})
    assert torch.allclose(both[:1], single, atol=1e-6) and torch.allclose(left, single, atol=1e-6)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_embeddings_are_the_bases_and_stored_only_where_trained() -> None:
    model = model_of("bert")
    items, _ = signals_of(model, tokenizer_of("bert"), probes(1), [0])
    for trained in (True, False):
        network = network_of(items, model, train_embeddings=trained)
        assert torch.equal(network.conditioner.embeddings, model.get_input_embeddings().weight)
        assert ("conditioner.embeddings" in network.state_dict()) == trained


def test_paper_preset() -> None:
    paper = PRESETS["paper"]
    assert paper.layers == 0 and paper.matrices == "all" and paper.condition_text == "change" and paper.constrained
    assert (paper.hidden, paper.condition, paper.max_scale, paper.margin) == (128, 1024, 1.0, 0.1)
