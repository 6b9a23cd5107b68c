"""Edits that contradict each other: on paper and at work."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import xpatch
from xpatch import EditRequest, PatchSet
from xpatch.patches.types import EditRecord
from xpatch.watch import check
from xpatch.watch.contradictions import contradictions, normalised


def claim_of(id, text, target, language="en", **more):
    return EditRequest(id=id, versions={language: {"text": text, **more}}, language=language, target=target)


def ledger(*requests):
    return PatchSet(
        parts={}, edits=tuple(EditRecord(id=r.id, method="x", status="failed", request=r) for r in requests)
    )


def found(model, *requests, others=None):
    sets = {"mine": ledger(*requests), **{name: ledger(*of) for name, of in (others or {}).items()}}
    return [
        (
            c.text,
            c.language,
            c.first.set_name,
            c.first.edit,
            c.first.target,
            c.second.set_name,
            c.second.edit,
            c.second.target,
        )
        for c in contradictions(sets, "mine", model)
    ]


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("Paris is big.", "paris  IS big", True),
        ("Ｐaris is big!", "Paris is big", True),
        ("北京很大。", "北京很大", True),
        ("Straße", "STRASSE", True),
        ("Paris is big.", "Paris isn't big.", False),
        ("3.5", "35", False),
        ("...", "!", True),
    ],
)
def test_light_normalisation(one, two, same):
    assert (normalised(one) == normalised(two)) is same


def test_one_claim_with_two_targets(tiny):
    model = tiny("bert")
    a, b = claim_of("a", "Paris is big.", "LABEL_0"), claim_of("b", "paris is BIG", "LABEL_1")
    assert found(model, a, b) == [("Paris is big.", "en", "mine", "a", "LABEL_0", "mine", "b", "LABEL_1")]
    assert found(model, a, claim_of("b", "paris is BIG", "LABEL_0")) == []
    assert found(model, a, claim_of("b", "paris is BIG", "LABEL_1", language="de")) == []


def test_a_label_and_its_index_are_one_target(tiny):
    assert found(tiny("bert"), claim_of("a", "x", "LABEL_1"), claim_of("b", "x", "1")) == []
    assert len(found(tiny("bert"), claim_of("a", "x", "LABEL_1"), claim_of("b", "x", "0"))) == 1


def test_words_of_a_language_model_are_compared_as_texts(tiny):
    model = tiny("gpt2-lm")
    assert found(model, claim_of("a", "x", " Paris."), claim_of("b", "x", "paris")) == []
    assert len(found(model, claim_of("a", "x", "Paris"), claim_of("b", "x", "Rome"))) == 1


def test_rephrases_versions_and_pairs(tiny):
    model = tiny("bert")
    a = EditRequest(
        id="a",
        versions={
            "en": {"text": "one", "rephrases": ["uno", {"text": "due", "target": "LABEL_1"}]},
            "de": {"text": "eins"},
        },
        target="LABEL_0",
    )
    assert [row[0] for row in found(model, a, claim_of("b", "UNO", "LABEL_1"))] == ["uno"]
    assert [row[0] for row in found(model, a, claim_of("b", "Eins!", "LABEL_1", language="de"))] == ["eins"]
    assert found(model, a, claim_of("b", "due", "LABEL_1")) == []  # the rephrase names its own target
    assert [row[0] for row in found(model, a, claim_of("b", "due", "LABEL_0"))] == ["due"]
    assert found(model, a, claim_of("b", "one", "LABEL_1", text_pair="and a second text")) == []


def test_what_was_rejected_claims_nothing(tiny):
    patches = ledger(claim_of("a", "x", "LABEL_0"), claim_of("b", "x", "LABEL_1"))
    assert len(list(contradictions({"mine": patches}, "mine", tiny("bert")))) == 1
    patches = replace(patches, edits=(patches.edits[0], replace(patches.edits[1], status="rejected")))
    assert list(contradictions({"mine": patches}, "mine", tiny("bert"))) == []


def test_the_checked_set_comes_first_and_others_are_not_compared_with_each_other(tiny):
    rows = found(
        tiny("bert"),
        claim_of("a", "x", "LABEL_0"),
        others={"old": [claim_of("a", "x", "LABEL_1")], "older": [claim_of("q", "x", "LABEL_0")]},
    )
    assert rows == [("x", "en", "mine", "a", "LABEL_0", "old", "a", "LABEL_1")]


def test_nothing_is_wrong_with_agreeing_edits(verifier, turn):
    model, tokenizer = verifier
    patches = turn(["ipod", "paris", "rome"], "REFUTES", name="fixes")
    report = patches.check(model, tokenizer)
    assert report.ok and not report and report.texts == 6
    assert str(report) == "no conflict found; 6 texts asked"
    xpatch.apply(model, patches)
    assert patches.check(model, tokenizer).ok  # it would replace itself
    assert not patches.check(model, tokenizer, name="twice")  # twice the same pull is no opposition


def test_edits_that_pull_one_answer_apart(verifier, turn, claims):
    model, tokenizer = verifier
    xpatch.apply(model, turn(["ipod", "rome"], "REFUTES"), name="served")
    mine = turn(["ipod", "paris"], "SUPPORTS", name="mine")
    served = xpatch.status(model)
    report = mine.check(model, tokenizer)
    assert report and not report.ok and xpatch.status(model) == served
    assert {(c.text, c.first.set_name, c.second.set_name) for c in report.contradictions} == {
        (text, "mine", "served") for text in claims["ipod"].values()
    }
    assert {(o.text, o.language) for o in report.oppositions} == {(text, code) for code, text in claims["ipod"].items()}
    for one in report.oppositions:
        assert (one.first.set_name, one.first.edits, one.first.raises) == ("mine", ("ipod",), "SUPPORTS")
        assert (one.second.set_name, one.second.edits, one.second.raises) == ("served", ("ipod",), "REFUTES")
        assert one.cosine < -0.99 and min(one.first.size, one.second.size) > 0.5
        assert one.first.size == pytest.approx(2 * one.first.moved)  # two labels: as far up as down
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False and data["oppositions"][0]["first"]["edits"] == ["ipod"]
    text = str(report)
    assert "edits of one claim with different targets" in text and "edits that pull one answer apart" in text
    assert "mine/ipod" in text and "served/ipod" in text


def test_within_one_set(verifier, turn):
    from dataclasses import replace

    model, tokenizer = verifier
    other = turn(["ipod"], "SUPPORTS")
    (record,) = other.edits
    request = record.request.model_copy(update={"id": "back"})
    both = turn(["ipod"], "REFUTES") + replace(other, edits=(replace(record, id="back", request=request),))
    report = check(both, model, tokenizer, name="s")
    assert {(o.first.edits, o.second.edits) for o in report.oppositions} == {(("ipod",), ("back",))}
    assert {(c.first.edit, c.second.edit) for c in report.contradictions} == {("ipod", "back")}


def test_a_weak_pull_is_no_opposition(verifier, turn, claims):
    model, tokenizer = verifier
    xpatch.apply(model, turn(["ipod"], "REFUTES", strength=0.02), name="served")
    texts = list(claims["ipod"].values())
    mine = turn(["ipod"], "SUPPORTS", name="mine")
    assert not mine.check(model, tokenizer, texts).oppositions
    assert mine.check(model, tokenizer, texts, notable=1e-3).oppositions


def test_given_texts_limit_and_redacted_requests(verifier, turn, claims):
    model, tokenizer = verifier
    xpatch.apply(model, turn(["ipod"], "REFUTES").redact(), name="served")
    mine = turn(["ipod"], "SUPPORTS", name="mine")
    heard = []
    report = mine.check(
        model, tokenizer, [claims["ipod"]["en"], claims["paris"]["en"]], limit=1, progress=lambda *w: heard.append(w)
    )
    assert report.texts == 2 and report.unread == (("served", "ipod"),) and not report.contradictions
    assert report.left_out == 1 and not report.oppositions  # the second of the two was over the limit
    assert "claims could not be compared, their requests are redacted: 1" in str(report) and "raise limit=" in str(
        report
    )
    assert ("firing", 2, 2) in heard and heard[-1][0] == "effects"
    assert len(mine.check(model, tokenizer, [claims["ipod"]["en"]]).oppositions) == 1


def test_expired_edits_are_left_out(verifier, turn):
    model, tokenizer = verifier
    xpatch.apply(model, turn(["ipod"], "REFUTES"), name="served")
    assert turn(["ipod"], "SUPPORTS", name="mine", expires="2001-01-01").check(model, tokenizer).ok
    assert not turn(["ipod"], "SUPPORTS", name="mine", expires="9999-01-01").check(model, tokenizer).ok


def test_language_models_and_deltas(tiny, word_tokenizer, owned):
    """Two deltas without a gate act on every text; opposite ones are found."""
    from dataclasses import replace

    model = tiny("gpt2-lm")
    one = owned(model, "lowrank")
    part = one.parts["part"]
    against = replace(one, parts={"part": replace(part, up=-0.6 * part.up)})
    xpatch.apply(model, against, name="served")
    report = check(one, model, word_tokenizer, ["w5 w6 w7"], name="mine", notable=0.01)
    pairs = {(o.first.edits, o.second.edits) for o in report.oppositions if o.second.set_name == "served"}
    assert {(("a",), ("a",)), (("b",), ("b",)), (("c",), ("c",))} <= pairs
    assert all(o.cosine < -0.5 or o.first.raises != o.second.raises for o in report.oppositions)
