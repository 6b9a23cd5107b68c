"""What each edit moved, against what taking it out really changes."""

from __future__ import annotations

import json
import threading

import pytest
import torch

import xpatch
from xpatch import FormatError, Rows
from xpatch.patches.types import EditRecord, PatchSet
from xpatch.watch import explain

TEXT = "w5 w6 w7 w8 w9"


def logits(model, tokenizer, text=TEXT, **more):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"), **more).logits[0]


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(
    ("form", "gate", "mask"),
    [
        ("neurons", None, False),
        ("neurons", None, True),
        ("neurons", "threshold", True),
        ("neurons", "ball", False),
        ("lowrank", None, True),
        ("lowrank", "threshold", False),
        ("lowrank", "ball", False),
    ],
)
def test_what_an_edit_moved_is_what_dropping_it_changes(tiny, word_tokenizer, owned, form, gate, mask, layer):
    model = tiny("bert")
    patches = owned(model, form, gate=gate, mask=mask, layer=layer)
    base = logits(model, word_tokenizer)
    xpatch.apply(model, patches, name="s")
    rows = Rows(languages="de")
    served = logits(model, word_tokenizer, xpatch=rows)
    found = explain(model, TEXT, tokenizer=word_tokenizer, language="de")
    labels = model.config.label2id
    assert found.answers[0].label == model.config.id2label[int(served.argmax())]
    assert found.base[0].label == model.config.id2label[int(base.argmax())]
    assert found.base[0].probability == pytest.approx(float(base.softmax(-1).max()), abs=1e-5)
    assert found.fired
    seen = set()
    for edit in found.fired:
        seen.add(edit.edits)
        if edit.edits:
            xpatch.apply(model, patches.drop(edit.edits[0]), name="s")
            expected = served - logits(model, word_tokenizer, xpatch=rows)
            for label, value in edit.moved:
                assert value == pytest.approx(float(expected[labels[label]]), rel=1e-4, abs=1e-5)
            assert edit.without[0].probability == pytest.approx(float((served - expected).softmax(-1).max()), abs=1e-5)
            assert edit.changes == bool((served - expected).argmax() != served.argmax())
    xpatch.apply(model, patches, name="s")
    for id in ("a", "b", "c"):  # what did not fire changes nothing
        if (id,) not in seen:
            xpatch.apply(model, patches.drop(id), name="s")
            assert torch.equal(logits(model, word_tokenizer, xpatch=rows), served)


def test_scores_and_tokens(tiny, word_tokenizer, owned):
    """Below the final FFN every token can matter; at the final one only the token the head reads."""
    for layer in (0, 1):
        model = tiny("bert")
        patches = owned(model, layer=layer)
        part = patches.parts["part"]
        seen = []
        up = model.bert.encoder.layer[layer].intermediate.dense
        handle = up.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0][0]))
        logits(model, word_tokenizer)
        handle.remove()
        scores = seen[0] @ part.keys.t() + part.bias
        if layer == 1:
            scores = scores[:1]
        xpatch.apply(model, patches, name="s")
        found = {edit.edits: edit for edit in explain(model, TEXT, tokenizer=word_tokenizer).fired}
        tokens = ["[CLS]", *TEXT.split(), "[SEP]"]
        rows = {("a",): [0, 3], ("b",): [1], ("c",): [2, 5], (): [4]}
        assert set(found) == {edits for edits, of in rows.items() if scores[:, of].max() > 0}
        for edits, edit in found.items():
            assert edit.score == pytest.approx(float(scores[:, rows[edits]].max()), rel=1e-4)
            assert edit.position == int(scores[:, rows[edits]].max(1).values.argmax())
            assert edit.token == tokens[edit.position] and edit.parts == ("part",)
        order = [edit.score for edit in found.values()]
        assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(
    "family", ["gpt2-lm", "llama", "bert-mlm", "t5", "bart", "gpt2", "xlm-r", "albert", "mixtral", "opt", "m2m100"]
)
def test_every_kind_of_model(tiny, word_tokenizer, owned, family):
    model = tiny(family)
    patches = owned(model)
    xpatch.apply(model, patches, name="s")
    text = "w5 [MASK] w7 w8" if family == "bert-mlm" else TEXT
    found = explain(model, text, tokenizer=word_tokenizer, top=3)
    assert len(found.answers) == min(3, 2 if hasattr(model, "num_labels") and family in ("gpt2", "xlm-r") else 3)
    assert found.fired and all(any(value for _, value in edit.moved) for edit in found.fired)
    edit = next(edit for edit in found.fired if edit.edits)
    xpatch.apply(model, patches.drop(edit.edits[0]), name="s")
    other = explain(model, text, tokenizer=word_tokenizer, top=3)
    assert other.answers[0].label == edit.without[0].label
    assert other.answers[0].probability == pytest.approx(edit.without[0].probability, abs=1e-5)


def test_inseparable_edits_are_switched_off_together(tiny, word_tokenizer, owned):
    model = tiny("bert")
    patches = owned(model)
    edits = [EditRecord(id=r.id, method=r.method, status=r.status, rows=r.rows, group="g") for r in patches.edits]
    together = PatchSet(parts=dict(patches.parts), edits=tuple(edits))
    xpatch.apply(model, together, name="s")
    served = logits(model, word_tokenizer)
    found = explain(model, TEXT, tokenizer=word_tokenizer)
    group = next(edit for edit in found.fired if edit.edits)
    assert group.edits == ("a", "b", "c")
    xpatch.apply(model, together.drop(["a", "b", "c"]), name="s")
    expected = served - logits(model, word_tokenizer)
    assert dict(group.moved)["LABEL_0"] == pytest.approx(float(expected[0]), rel=1e-4, abs=1e-5)
    assert "a and 2 more" in str(found)


def test_sets_are_told_apart(tiny, word_tokenizer, owned):
    model = tiny("bert")
    for name, seed in (("one", 1), ("two", 2)):
        xpatch.apply(model, owned(model, seed=seed), name=name)
    found = explain(model, TEXT, tokenizer=word_tokenizer)
    assert {edit.set_name for edit in found.fired} == {"one", "two"}
    served = logits(model, word_tokenizer)
    strongest = next(edit for edit in found.fired if edit.edits)
    patches = owned(model, seed={"one": 1, "two": 2}[strongest.set_name])
    xpatch.apply(model, patches.drop(strongest.edits[0]), name=strongest.set_name)
    expected = served - logits(model, word_tokenizer)
    assert dict(strongest.moved)["LABEL_1"] == pytest.approx(float(expected[1]), rel=1e-4, abs=1e-5)


def test_the_limit_is_kept_and_told(tiny, word_tokenizer, owned):
    model = tiny("bert")
    xpatch.apply(model, owned(model, layer=0), name="s")
    every = explain(model, TEXT, tokenizer=word_tokenizer)
    assert len(every.fired) > 1 and every.left_out == 0
    one = explain(model, TEXT, tokenizer=word_tokenizer, limit=1)
    assert one.fired[0].edits == every.fired[0].edits and one.left_out == len(every.fired) - 1
    assert f"{one.left_out} more edits fired" in str(one)
    small = explain(model, TEXT, tokenizer=word_tokenizer, batch_size=1)
    for first, second in zip(every.fired, small.fired, strict=True):
        assert first.edits == second.edits
        torch.testing.assert_close(dict(first.moved)["LABEL_0"], dict(second.moved)["LABEL_0"], rtol=1e-3, atol=1e-5)


def test_a_model_without_patches(tiny, word_tokenizer):
    found = explain(tiny("bert"), TEXT, tokenizer=word_tokenizer, text_pair="w10 w11")
    assert found.fired == () and found.base == found.answers and found.text_pair == "w10 w11"
    assert "no edit fired" in str(found) and "| w10 w11" in str(found)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("expected a text", {"text": " "}),
        ("expected a text", {"text": None}),
        ("tokenizer", {"text": "w5", "tokenizer": None}),
        ("limit >= 0", {"text": "w5", "limit": -1}),
    ],
)
def test_bad_arguments(tiny, word_tokenizer, words, arguments):
    with pytest.raises(FormatError, match=words):
        explain(tiny("bert"), **{"tokenizer": word_tokenizer, **arguments})


def test_the_verifier_turned_by_an_edit(verifier, turn, claims):
    model, tokenizer = verifier
    xpatch.apply(model, turn(["ipod", "paris"], "REFUTES"), name="fixes")
    for language, text in claims["ipod"].items():
        found = explain(model, text, tokenizer=tokenizer, language=language)
        assert (found.base[0].label, found.answers[0].label) == ("SUPPORTS", "REFUTES")
        (edit,) = found.fired
        assert (edit.set_name, edit.edits, edit.token, edit.position) == ("fixes", ("ipod",), "[CLS]", 0)
        assert edit.changes and edit.without[0] == found.base[0]
        assert dict(edit.moved)["REFUTES"] > 0 > dict(edit.moved)["SUPPORTS"]
        data = json.loads(json.dumps(found.to_dict()))
        assert data["fired"][0]["edits"] == ["ipod"] and data["language"] == language
        assert data["answers"][0]["label"] == "REFUTES" and "SUPPORTS" in str(found)
    assert xpatch.status(model).names == ("fixes",)


def test_others_are_served_meanwhile(tiny, word_tokenizer, owned):
    """Eight threads serve while the model is explained: every answer is the served one, and nothing is counted for the twin."""
    model = tiny("bert")
    xpatch.apply(model, owned(model), name="s")
    xpatch.status(model, count=True)
    served = logits(model, word_tokenizer)
    answers, done = [], threading.Event()

    def serve():
        while not done.is_set():
            answers.append(torch.equal(logits(model, word_tokenizer), served))

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            explain(model, TEXT, tokenizer=word_tokenizer)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert answers and all(answers)
    per_call = explain(model, TEXT, tokenizer=word_tokenizer)
    fired = sum(2 if edit.edits in (("a",), ("c",)) else 1 for edit in per_call.fired)
    assert len(answers) + 1 <= xpatch.status(model).parts[0].fired <= fired * (len(answers) + 1)
