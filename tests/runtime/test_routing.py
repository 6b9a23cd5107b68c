from __future__ import annotations

import threading

import pytest
import torch

import xpatch
from xpatch import MismatchError, Rows


@pytest.fixture
def served(tiny, patch_of):
    """A model with the sets "a" and "b", at different layers."""
    model = tiny("bert")
    xpatch.apply(model, patch_of(model, "neurons", seed=1), name="a")
    return xpatch.apply(model, patch_of(model, "lowrank", seed=2, layer=0), name="b")


@torch.no_grad()
def test_each_row_gets_its_own_sets(served, token_ids):
    everything = served(token_ids).logits
    with xpatch.disabled(served):
        base = served(token_ids).logits
    only_a = served(token_ids, xpatch=Rows(patches="a")).logits
    only_b = served(token_ids, xpatch=Rows(patches=["b", "b", ["b"]])).logits
    rows = served(token_ids, xpatch=Rows(patches=["a", "__base__", ["b", "a"]])).logits
    assert torch.equal(rows[0], only_a[0]) and torch.equal(rows[1], base[1]) and torch.equal(rows[2], everything[2])
    rows = served(token_ids, xpatch=Rows(patches=[None, "b", []])).logits
    assert torch.equal(rows[0], everything[0]) and torch.equal(rows[1], only_b[1]) and torch.equal(rows[2], base[2])
    assert torch.equal(served(token_ids, xpatch=Rows(patches="__base__")).logits, base)
    assert torch.equal(served(token_ids, xpatch=Rows()).logits, everything)
    assert len({tuple(logits[0].tolist()) for logits in (everything, base, only_a, only_b)}) == 4


@torch.no_grad()
def test_rows_of_a_model_that_flattens_its_tokens(tiny, token_ids, patch_of):
    model = tiny("opt")
    base = model(token_ids).logits
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    patched = model(token_ids).logits
    rows = model(token_ids, xpatch=Rows(patches=["__base__", "a", "__base__"])).logits
    assert torch.equal(rows, torch.stack([base[0], patched[1], base[2]]))


@torch.no_grad()
def test_the_context_form_and_the_argument_that_wins(served, token_ids):
    only_a = served(token_ids, xpatch=Rows(patches="a")).logits
    only_b = served(token_ids, xpatch=Rows(patches="b")).logits
    with xpatch.rows(patches="a"):
        assert torch.equal(served(token_ids).logits, only_a)
        assert torch.equal(served(token_ids, xpatch=Rows(patches="b")).logits, only_b)
        with xpatch.rows(patches=["b", "b", "b"]):
            assert torch.equal(served(token_ids).logits, only_b)
        assert torch.equal(served(token_ids).logits, only_a)
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(served(token_ids).logits))
        thread.start()
        thread.join()
        assert not torch.equal(elsewhere[0], only_a)


@pytest.mark.parametrize(
    "rows, message",
    [
        (lambda: Rows(patches=["a"]), r"Rows\(patches=...\) has 1 entries but the batch has 3 rows"),
        (lambda: Rows(languages=["en"] * 4), r"Rows\(languages=...\) has 4 entries but the batch has 3 rows"),
        (lambda: Rows(patches=["a", "c", "a"]), r"row 1: no patch set is called 'c'; applied are 'a', 'b'"),
        (lambda: Rows(patches="c"), "no patch set is called 'c'"),
        (lambda: Rows(languages=["en"], patches=["a", "b"]), "1 languages but 2 patches entries"),
        (lambda: Rows(patches=[["a", "__base__"]] * 3), "'__base__' means no patches and cannot be combined"),
        (lambda: Rows(patches=[1, 2, 3]), "row 0: expected a name, a list of names or '__base__'; found 1"),
        (lambda: Rows(languages=[None] * 3), "row 0: expected a language code; found None"),
        (lambda: Rows(patches=3), "expected a string or a list, one entry per row; found 3"),
        (lambda: {"patches": "a"}, r"takes xpatch.Rows\(languages=..., patches=...\); found dict"),
    ],
)
@torch.no_grad()
def test_wrong_rows(served, token_ids, rows, message):
    before = served(token_ids).logits
    with pytest.raises(MismatchError, match=message):
        served(token_ids, xpatch=rows())
    assert torch.equal(served(token_ids).logits, before)


@torch.no_grad()
def test_generate_takes_rows_too(tiny, token_ids, patch_of):
    model = tiny("gpt2-lm")
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(token_ids)}
    base = model.generate(token_ids, **options)
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    patched = model.generate(token_ids, **options)
    assert not torch.equal(base, patched)
    mixed = torch.stack([patched[0], base[1], patched[2]])
    names = ["a", "__base__", "a"]
    assert torch.equal(model.generate(token_ids, xpatch=Rows(patches=names), **options), mixed)
    with xpatch.rows(patches=names):
        assert torch.equal(model.generate(token_ids, **options), mixed)
    with xpatch.disabled(model):
        assert torch.equal(model.generate(token_ids, **options), base)
    with pytest.raises(MismatchError, match="names 3 rows but a patched layer sees 6"):
        model.generate(token_ids, xpatch=Rows(patches=names), num_beams=2, **options)
    assert torch.equal(model.generate(token_ids, **options), patched)
