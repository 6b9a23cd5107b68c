"""The gradient's factors, against plain autograd; which linears are edited; the low-rank side path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.editors.conftest import model_of, tokenizer_of
from tests.editors.hyper.conftest import gradients, probes, signals_of
from xpatch.editors.guard import untouched
from xpatch.editors.hyper.lowrank import Factors, side_path
from xpatch.editors.hyper.sites import edited_linears
from xpatch.editors.hyper.texts import Encoder
from xpatch.errors import MismatchError
from xpatch.models.linears import linear


@pytest.mark.parametrize("matrices", ["ffn", "all"])
def test_the_factors_give_each_edits_gradient(model: Any, tokenizer: Any, matrices: str) -> None:
    texts, labels = probes(), [0, 2, 1]
    items, signals = signals_of(model, tokenizer, texts, labels, matrices=matrices)
    for edit, (text, label) in enumerate(zip(texts, labels, strict=True)):
        expected = gradients(model, tokenizer, text, label, [item.name for item in items])
        for item in items:
            seen = signals[item.name]
            mine = seen.owner == edit
            assert torch.allclose(seen.delta[mine].T @ seen.x[mine], expected[item.name], atol=1e-6), item.name


def test_empty_rows_are_left_out() -> None:
    """Of a classifier's last layer only the read token has a gradient; padding has none anywhere."""
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    texts = probes()
    items, signals = signals_of(model, tokenizer, texts, [0, 1, 2])
    sizes = [len(Encoder(model, tokenizer).encode(text)["input_ids"]) for text in texts]
    counts = {item.name: torch.bincount(signals[item.name].owner).tolist() for item in items}
    assert [found for name, found in counts.items() if ".layer.1." in name] == [[1, 1, 1]] * 2
    assert [found for name, found in counts.items() if ".layer.0." in name] == [sizes] * 2
    for seen in signals.values():
        assert (seen.x != 0).any(-1).all() and (seen.delta != 0).any(-1).all()


def test_which_linears(tiny: Any) -> None:
    def names(family: str, **options: Any) -> list[str]:
        return [item.name for item in edited_linears(tiny(family, layers=4), **options)]

    assert names("bert") == [
        f"bert.encoder.layer.{layer}.{part}.dense" for layer in (1, 2, 3) for part in ("intermediate", "output")
    ]
    assert names("gpt2", layers=1) == ["transformer.h.3.mlp.c_fc", "transformer.h.3.mlp.c_proj"]
    assert names("llama", layers=1) == ["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.down_proj"]
    assert len(names("bert", layers=0)) == 8 and len(names("bert", layers=0, matrices="all")) == 4 * 6
    assert {item.shape for item in edited_linears(tiny("gpt2"))} == {(32, 64), (64, 32)}
    with pytest.raises(MismatchError, match="mixture of experts"):
        names("mixtral")


def test_side_path_equals_changed_weights(model: Any, tokenizer: Any) -> None:
    """Rows of edit e see the dense change of edit e; gradients reach both factors."""
    texts = [probe for probe in probes() for _ in range(2)]
    with untouched(model):
        items, inputs = edited_linears(model, 2), Encoder(model, tokenizer)(texts)
        owner = torch.tensor([2, 0, 0, 1])
        factors = {
            item.name: Factors(torch.randn(4, item.inside), torch.randn(4, item.outside) / 9, owner) for item in items
        }
        for found in factors.values():
            found.up.requires_grad_(True)
        with side_path(model, factors, 3):
            side = model(**inputs).logits
        side.sum().backward()
        assert all(found.up.grad is not None and found.up.grad.abs().sum() > 0 for found in factors.values())
        for edit in range(3):
            before = {item.name: linear(model, item.name)[0].weight.detach().clone() for item in items}
            try:
                with torch.no_grad():
                    for item in items:
                        module = linear(model, item.name)[0]
                        change = factors[item.name].dense(edit)
                        module.weight += change.T if type(module).__name__ == "Conv1D" else change
                    dense = model(**inputs).logits
            finally:
                with torch.no_grad():
                    for item in items:
                        linear(model, item.name)[0].weight.copy_(before[item.name])
            assert torch.allclose(side[2 * edit : 2 * edit + 2], dense[2 * edit : 2 * edit + 2], atol=1e-4)
        assert not torch.allclose(side, model(**inputs).logits, atol=1e-3)


def test_factors_of_one_edit() -> None:
    factors = Factors(torch.arange(6.0).view(3, 2), torch.arange(3.0).view(3, 1), torch.tensor([1, 0, 1]))
    down, up = factors.padded(3)
    assert down.shape == (3, 2, 2) and up.shape == (3, 2, 1)
    assert down[1].tolist() == [[0, 1], [4, 5]] and down[2].abs().sum() == 0 and down[0, 1].abs().sum() == 0
    assert torch.equal(factors.dense(1), factors.of(1).dense(0)) and len(factors.of(2).down) == 0
