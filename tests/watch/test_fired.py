"""`xpatch.firings`: the counters by edit and language."""

from __future__ import annotations

import json

import pytest
import torch

import xpatch
from xpatch import DenseDelta, Gate, LowRankDelta, PatchNeurons, PatchSet, Rows
from xpatch.patches.types import EditRecord
from xpatch.watch.fired import SHOWN, EditFirings, FiringReport

SITE = "bert.encoder.layer.1"
DOWN = "bert.encoder.layer.0.output.dense"


def always(bias: list[float]) -> PatchNeurons:
    """Silent keys: the bias alone decides."""
    return PatchNeurons(SITE, torch.zeros(len(bias), 32), torch.tensor(bias), 1e-3 * torch.randn(len(bias), 32), "relu")


def record(id, rows, group=None):
    return EditRecord(id=id, method="by-hand", status="edited", rows=rows, group=group)


@torch.no_grad()
def test_by_edit_and_language(tiny, token_ids):
    """a: two neurons that fire, b: none, c and d: one neuron each in one group, and a row nobody owns."""
    model = tiny("bert")
    edits = (
        record("a", {"n": (0, 3)}),
        record("b", {"n": (1,)}),
        record("c", {"n": (2,)}, "g"),
        record("d", {"n": (5,)}, "g"),
    )
    patches = PatchSet(parts={"n": always([1.0, -1.0, 1.0, 1.0, 1.0, -1.0])}, edits=edits)
    xpatch.apply(model, patches, name="s")
    xpatch.status(model, count=True)
    model(token_ids, xpatch=Rows(languages=["en", "de", "en"]))
    model(token_ids)
    found = xpatch.firings(model)
    assert found.counting and found.since is not None
    assert [(e.set_name, e.edits, e.part, e.neurons, e.fired, dict(e.languages)) for e in found.entries] == [
        ("s", ("a",), "n", 2, 12, {"de": 2, "en": 4, "?": 6}),
        ("s", ("b",), "n", 1, 0, {}),
        ("s", ("c", "d"), "n", 2, 6, {"de": 1, "en": 2, "?": 3}),
        ("s", (), "n", 1, 6, {"de": 1, "en": 2, "?": 3}),
    ]
    assert [entry.edits for entry in found.silent] == [("b",)]
    assert found.fired[0].edits == ("a",)
    assert sum(entry.fired for entry in found.entries) == xpatch.status(model).parts[0].fired
    data = json.loads(json.dumps(found.to_dict()))
    assert data["entries"][0] == {
        "set_name": "s", "edits": ["a"], "part": "n", "neurons": 2, "fired": 12, "languages": {"de": 2, "en": 4, "?": 6}
    }  # fmt: skip
    text = str(found)
    for words in ("de 2, en 4, ? 6", "c and 1 more", "(no edit)", "1 of 4 never fired"):
        assert words in text


@torch.no_grad()
def test_reset_returns_the_counts_and_starts_again(tiny, token_ids):
    model = xpatch.apply(tiny("bert"), PatchSet(parts={"n": always([1.0])}), name="s")
    xpatch.status(model, count=True)
    model(token_ids)
    assert xpatch.firings(model, reset=True).entries[0].fired == 3
    assert xpatch.firings(model).entries[0].fired == 0
    model(token_ids)
    assert xpatch.firings(model).entries[0].fired == 3


@torch.no_grad()
def test_deltas(tiny, token_ids):
    """A gated delta counts inputs for each edit with a rank in it; one without a gate acts always and is named as such."""
    model = tiny("bert")
    gate = Gate("ball", keys=torch.zeros(1, 64), radii=torch.tensor([1e6]))  # open everywhere
    parts = {
        "gated": LowRankDelta(DOWN, torch.randn(3, 64), 1e-3 * torch.randn(32, 3), gate="g"),
        "shared": DenseDelta(DOWN, 1e-3 * torch.randn(32, 64), gate="g"),
        "bare": LowRankDelta(DOWN, torch.randn(2, 64), 1e-3 * torch.randn(32, 2)),
    }
    edits = (record("a", {"gated": (0, 2)}), record("b", {"gated": (1,), "shared": ()}), record("c", {"shared": ()}))
    xpatch.apply(model, PatchSet(parts=parts, edits=edits, gates={"g": gate}), name="s")
    xpatch.status(model, count=True)
    model(token_ids, xpatch=Rows(languages="fr"))
    found = xpatch.firings(model)
    assert [(e.edits, e.part, e.neurons, e.fired, dict(e.languages)) for e in found.entries] == [
        (("a",), "gated", 2, 3, {"fr": 3}),
        (("b", "c"), "gated", 1, 3, {"fr": 3}),
        (("b", "c"), "shared", 0, 3, {"fr": 3}),
    ]
    assert found.always == (("s", "bare"),) and "part 'bare' acts on every input" in str(found)


def test_where_nothing_is_counted(tiny):
    model = tiny("bert")
    assert xpatch.firings(model) == FiringReport(counting=False)
    xpatch.apply(model, PatchSet(parts={"n": always([1.0])}), name="s")
    xpatch.status(model, count=False)
    found = xpatch.firings(model)
    assert not found.counting and "not counted" in str(found) and found.to_dict()["entries"] == []


def test_a_value_that_cannot_be_assigned():
    report = FiringReport(counting=True)
    with pytest.raises(AttributeError):
        report.since = "now"


def test_long_tables_are_cut():
    entries = tuple(
        EditFirings("s", (f"e{number}",), "n", 1, number + 1, {"en": number + 1}) for number in range(SHOWN + 5)
    )
    text = str(FiringReport(True, "2030-01-01T00:00:00+00:00", entries))
    assert "5 more fired" in text and len(text.split("\n")) == SHOWN + 3


def test_the_verifier_counts_the_edits_that_matter(verifier, turn, claims):
    """Each claim's own edit fires on it, in both languages, and no other does."""
    model, tokenizer = verifier
    ids = ["ipod", "paris", "rome"]
    xpatch.apply(model, turn(ids, "REFUTES"), name="fixes")
    xpatch.status(model, count=True)
    for id in ids[:2]:
        batch = tokenizer(list(claims[id].values()), return_tensors="pt", padding=True)
        with torch.no_grad():
            model(**batch, xpatch=Rows(languages=list(claims[id])))
    found = {entry.edits: dict(entry.languages) for entry in xpatch.firings(model).entries}
    assert set(found[("ipod",)]) == {"en", "de"} == set(found[("paris",)]) and found[("rome",)] == {}
