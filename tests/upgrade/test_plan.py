"""Which edits are trained again and how: pure bookkeeping over a ledger."""

from __future__ import annotations

import datetime
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from xpatch import EditRequest, FormatError, MismatchError, PatchNeurons, PatchSet
from xpatch.editors import methods
from xpatch.patches.identity import BaseIdentity
from xpatch.patches.types import EditRecord
from xpatch.upgrade.plan import check_labels, plan

NOW = datetime.datetime(2026, 3, 10, 12, 0, tzinfo=datetime.timezone.utc)


def record(id, *, method="mpn", preset="default", seed=0, settings=None, **request):
    asked = EditRequest(id=id, versions={"en": "a claim", "de": "eine Behauptung"}, **{"target": "YES", **request})
    return EditRecord(
        id=id, method=method, status="edited", request=asked, seed=seed, hyperparameters={"preset": preset, **(settings or {})}
    )  # fmt: skip


def of(*records):
    return PatchSet(parts={}, edits=records)


def ids(batch):
    return [request.id for request in batch.requests]


def test_edits_keep_what_their_records_say_and_are_grouped_by_it():
    done = plan(
        of(
            record("a", settings={"steps": 7}),
            record("b", method="ft", preset="paper", seed=3),
            record("c", settings={"steps": 7}),
            record("d", settings={"steps": 8}),
            record("e", settings={"steps": 7}, seed=1),
        ),
        now=NOW,
    )
    assert [ids(batch) for batch in done.batches] == [["a", "c"], ["b"], ["d"], ["e"]]
    assert [(batch.method, batch.preset, batch.seed) for batch in done.batches] == [
        ("mpn", "default", 0), ("ft", "paper", 3), ("mpn", "default", 0), ("mpn", "default", 1),
    ]  # fmt: skip
    assert [dict(batch.settings) for batch in done.batches] == [{"steps": 7}, {}, {"steps": 8}, {"steps": 7}]
    assert [request.id for request in done.requests] == ["a", "c", "b", "d", "e"]


def test_overrides_replace_what_was_recorded():
    patches = of(record("a", settings={"steps": 7}, preset="paper", seed=5), record("b", method="t-patcher"))
    same = plan(patches, method="mpn", seed=9, now=NOW).batches
    assert [(batch.method, batch.preset, dict(batch.settings), batch.seed) for batch in same] == [
        ("mpn", "paper", {"steps": 7}, 9),  # the method it had: its settings stay
        ("mpn", "default", {}, 9),
    ]
    (fresh,) = plan(patches, method="mpn", preset="default", seed=0, now=NOW).batches
    assert ids(fresh) == ["a", "b"] and dict(fresh.settings) == {}
    assert dict(plan(patches, overrides={"steps": 2}, now=NOW).batches[0].settings) == {"steps": 2}


def test_a_preset_that_is_gone_is_told_by_its_settings():
    (batch,) = plan(of(record("a", preset="last-year", settings={"steps": 7})), now=NOW).batches
    assert (batch.preset, dict(batch.settings)) == ("default", {"steps": 7})


def test_redacted_and_expired_edits_are_left_out_with_their_reason():
    gone = of(record("a")).redact().edits[0]
    bare = of(record("b")).redact("target").edits[0]
    late, kept = record("c", expires="2026-03-09"), record("d", expires="2026-03-10")
    done = plan(of(gone, bare, late, kept), now=NOW)
    assert {id: word for id, (word, _) in done.left_out.items()} == {"a": "redacted", "b": "redacted", "c": "expired"}
    assert "target" in done.left_out["b"][1] and "2026-03-09" in done.left_out["c"][1]
    assert ids(done.batches[0]) == ["d"]
    with pytest.raises(FormatError, match="edit 'f', expires: expected a date .* found 'soon'"):
        plan(of(kept, record("f", expires="soon")), now=NOW)


def test_rejected_requests_are_left_out_before_their_labels_are_looked_at():
    bad = replace(record("a", target="MAYBE"), status="rejected", message="no label 'MAYBE'")
    unsaid = of(replace(record("b"), status="rejected")).redact().edits[0]
    done = plan(of(bad, unsaid, record("c")), now=NOW)
    assert [(word, why) for word, why in done.left_out.values()] == [
        ("rejected", "no label 'MAYBE'"), ("rejected", "it was rejected when it was asked for"),
    ]  # fmt: skip
    assert ids(done.batches[0]) == ["c"]
    with pytest.raises(MismatchError, match="all are rejected"):
        plan(of(bad))


def test_what_cannot_be_planned_says_why():
    with pytest.raises(FormatError, match="ledger holds no edits"):
        plan(of())
    with pytest.raises(MismatchError, match="none of the 2 edits .* expired or redacted"):
        plan(of(of(record("a")).redact().edits[0], record("b", expires="2000-01-01")))
    with pytest.raises(MismatchError, match=r"no method 'magic' \(2 edits, first 'a'\); methods: .*ft, .*--method"):
        plan(of(record("a", method="magic"), record("b", method="magic")))
    with pytest.raises(FormatError, match="no preset 'best'; presets: paper, default"):
        plan(of(record("a")), preset="best")
    assert plan(of(record("a", method="magic")), method="ft").batches[0].method == "ft"


def test_labels_the_new_base_lacks_are_named_with_their_edits():
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "NO", 1: "YES"}), num_labels=2)
    asked = plan(of(record("a", target="MAYBE"), record("b", target="MAYBE"), record("c", target="7"))).requests
    with pytest.raises(
        MismatchError, match=r"no label '7' \(edit 'c'\), 'MAYBE' \(2 edits, first 'a'\); its labels are NO, YES"
    ):
        check_labels(asked, of(), model)
    check_labels(plan(of(record("a"), record("b", target="0"))).requests, of(), model)


def test_an_index_must_keep_its_meaning():
    """Label 1 of the old base and label 1 of the new one may be opposites; names are looked up, indices cannot be."""
    digests = {"fp32": "0" * 64, "fp16": "0" * 64, "bf16": "0" * 64}
    base = BaseIdentity(
        architecture="Bert", id2label={0: "YES", 1: "NO"}, dtype="float32", all_weights=digests, body=digests
    )
    patches = PatchSet(parts={}, edits=(record("a", target="1"), record("b")), base=base)
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "NO", 1: "YES"}), num_labels=2)
    with pytest.raises(MismatchError, match=r"1 was 'NO', is 'YES'; requests '1' \(edit 'a'\)"):
        check_labels(plan(patches).requests, patches, model)


def test_every_method_can_be_recorded_and_planned():
    neurons = PatchNeurons(site="s", keys=torch.zeros(1, 2), bias=torch.zeros(1), values=torch.zeros(1, 2), activation="relu")  # fmt: skip
    for name, info in methods().items():
        for preset in info.presets:
            patches = PatchSet(parts={"neurons": neurons}, edits=(record("a", method=name, preset=preset),))
            assert plan(patches).batches[0].preset == preset
