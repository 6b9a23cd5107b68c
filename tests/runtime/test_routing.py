from __future__ import annotations

import pickle
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
        (lambda: Rows(languages=[3] * 3), "row 0: expected a language code, .auto. or None; found 3"),
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


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2-lm", "llama", "t5"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_beams": 2, "use_cache": False, "do_sample": False},
    ],
)
def test_beams_and_returned_sequences_follow_their_row(tiny, token_ids, patch_of, family, how):
    """Each row gets the sequences it gets alone, whatever the other rows of the batch are given."""
    model = tiny(family)
    for name, seed in (("a", 1), ("b", 2)):
        xpatch.apply(model, patch_of(model, "neurons", seed=seed, layer=-1), name=name)
    options = {"max_new_tokens": 4, "pad_token_id": 0, **how}
    token_ids = token_ids.repeat(1, 1)
    choices = ["a", "__base__", ("a", "b")]
    per_row = [
        model.generate(token_ids, xpatch=Rows(patches=[choice] * 3), **options).chunk(3)[row]
        for row, choice in enumerate(choices)
    ]
    found = model.generate(token_ids, xpatch=Rows(patches=choices), **options).chunk(3)
    for row in range(3):
        assert torch.equal(_trimmed(found[row]), _trimmed(per_row[row]))
    assert not torch.equal(_trimmed(per_row[1]), _trimmed(model.generate(token_ids, **options).chunk(3)[1]))
    with pytest.raises(MismatchError, match="has 2 entries but the batch has 3 rows"):
        model.generate(token_ids, xpatch=Rows(patches=["a", "b"]), **options)


@torch.no_grad()
def test_sampled_sequences_follow_their_row(tiny, token_ids, patch_of):
    model = tiny("gpt2-lm")
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3, "pad_token_id": 0}

    def sampled(patches):
        torch.manual_seed(3)
        return model.generate(token_ids, xpatch=Rows(patches=patches), **options)

    base, mixed, patched = sampled("__base__"), sampled(["__base__", "a", "__base__"]), sampled("a")
    rows = slice(3, 6)
    first = token_ids.shape[1]  # the first sampled token depends on nothing but the row's own logits and the seed
    assert torch.equal(mixed[:3, first], base[:3, first]) and torch.equal(mixed[6:, first], base[6:, first])
    assert torch.equal(mixed[rows, first], patched[rows, first])
    assert not torch.equal(patched[:, first], base[:, first])


@torch.no_grad()
def test_masks_follow_the_language_of_each_beam(tiny, token_ids, patch_of):
    model = tiny("gpt2-lm")
    xpatch.apply(model, patch_of(model, "neurons", mask=True), name="a")
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    alone = [
        model.generate(token_ids, xpatch=Rows(languages=language), **options)[row]
        for row, language in enumerate(("en", "de", "fr"))
    ]
    together = model.generate(token_ids, xpatch=Rows(languages=["en", "de", "fr"]), **options)
    for row in range(3):
        assert torch.equal(_trimmed(together[row : row + 1]), _trimmed(alone[row].unsqueeze(0)))


def _trimmed(sequences):
    """Without the padding at the end, whose length depends on the other rows."""
    kept = int((sequences != 0).any(0).nonzero().max()) + 1
    return sequences[:, :kept]


def test_languages_are_identified_where_they_are_not_named():
    texts = ["Paris is the capital of France.", "Berlin ist die Hauptstadt von Deutschland.", "北京是中国的首都。"]
    assert Rows("auto", texts=texts, candidates=["en", "de", "zh"]).languages == ("en", "de", "zh")
    named = Rows(["fr", "auto", "auto"], texts=texts, candidates=["en", "de", "zh"])
    assert named.languages == ("fr", "de", "zh")  # an explicit language wins over the text
    unsure = Rows("auto", texts=["1234", *texts[1:]], candidates=["en", "de"], default="en")
    assert unsure.languages[:2] == ("en", "de")
    assert "texts" not in vars(named) and "Berlin" not in repr(named)
    with xpatch.rows("auto", texts=texts, candidates=["en", "de", "zh"]) as chosen:
        assert chosen.languages == ("en", "de", "zh")
    with pytest.raises(MismatchError, match="texts"):
        Rows("auto")
    with pytest.raises(MismatchError, match="2"):
        Rows(["en", "auto", "de"], texts=texts[:2])


@torch.no_grad()
def test_a_row_without_a_language_is_left_without_a_mask(tiny, token_ids, patch_of):
    model = tiny("bert")
    patches = patch_of(model, "neurons", mask=True)
    xpatch.apply(model, patches, name="a")
    found = model(token_ids, xpatch=Rows(["en", None, "fr"])).logits
    english = model(token_ids, xpatch=Rows("en")).logits
    unknown = model(token_ids, xpatch=Rows("fr")).logits
    assert torch.allclose(found[0], english[0], atol=1e-6) and torch.allclose(found[1:], unknown[1:], atol=1e-6)
    assert pickle.loads(pickle.dumps(Rows(["en", None], ["a", None]))) == Rows(["en", None], ["a", None])
