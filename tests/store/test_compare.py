"""What differs between two sets: per edit, with its languages, and nothing where the fingerprints are equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpatch import DenseDelta, Gate, LanguageMask, LowRankDelta, PatchNeurons, PatchSet
from xpatch.patches.types import EditRecord
from xpatch.store.compare import compare

MakeSet = Callable[..., PatchSet]


def edited(patches: PatchSet, id: str, **changes: object) -> PatchSet:
    records = tuple(replace(record, **changes) if record.id == id else record for record in patches.edits)
    return replace(patches, edits=records)


def test_added_and_removed(make_set: MakeSet) -> None:
    one, two = make_set(ids=("a", "b", "c")), make_set(ids=("a", "b", "c"))
    found = compare(one.drop("a"), two.drop("c"))
    assert [edit.id for edit in found.added] == ["a"] and [edit.id for edit in found.removed] == ["c"]
    assert found.added[0].languages == ("de", "en") and (found.same, found.changed, found.others) == (1, (), ())
    assert found and "+ a (de, en)" in str(found) and "- c (de, en)" in str(found)


def test_the_same(make_set: MakeSet) -> None:
    found = compare(make_set(name="one"), make_set(name="two"))
    assert not found and found.same == 1 and found.languages == () and found.others == ()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"method": "ft"}, ("method",)),
        ({"status": "failed"}, ("status",)),
        ({"seed": 7}, ("settings",)),
        ({"hyperparameters": {"lr": 1}}, ("settings",)),
        ({"message": "x"}, ("settings",)),
        ({"rows": {}}, ("patch",)),
    ],
)
def test_changed_records(make_set: MakeSet, changes: dict[str, object], what: tuple[str, ...]) -> None:
    patches = make_set(ids=("a", "b"))
    found = compare(patches, edited(patches, "b", **changes))
    assert [(edit.id, edit.what, edit.languages) for edit in found.changed] == [("b", what, ("de", "en"))]
    assert found.same == 1


def test_changed_tensors_are_told_from_rows_that_moved(make_set: MakeSet) -> None:
    patches = make_set(ids=("a", "b"))
    part = patches.parts["neurons.0"]
    assert isinstance(part, PatchNeurons)
    swapped = replace(part, keys=part.keys.flip(0), bias=part.bias.flip(0), values=part.values.flip(0))
    moved = PatchSet(
        {"n": swapped},
        edits=tuple(replace(r, rows={"n": (1 - r.rows["neurons.0"][0],)}) for r in patches.edits),
    )
    assert compare(patches, moved).changed == () and compare(patches, moved).others, (
        "other names and places, the same patches"
    )
    bias = part.bias.clone()
    bias[1] += 1
    harder = replace(patches, parts={"neurons.0": replace(part, bias=bias)})
    assert [(edit.id, edit.what) for edit in compare(patches, harder).changed] == [("b", ("patch",))]


def test_only_the_languages_whose_wording_changed(make_set: MakeSet) -> None:
    patches = make_set()
    request = patches.edits[0].request
    assert request is not None
    german = request.model_copy(update={"versions": {**request.versions, "de": request.versions["en"]}})
    assert compare(patches, edited(patches, "a", request=german)).changed[0].languages == ("de",)
    target = request.model_copy(update={"target": "SUPPORTS"})
    assert compare(patches, edited(patches, "a", request=target)).languages == ("de", "en")
    redacted = compare(patches, patches.redact())
    assert redacted.changed[0].what == ("request",) and redacted.languages == ("de", "en")
    assert "languages not recorded" in str(compare(patches.redact(), edited(patches.redact(), "a", method="ft")))


def test_differences_no_edit_owns() -> None:
    def masked(inner: float, gate: float = 1.0, free: float = 0.0) -> PatchSet:
        neurons = PatchNeurons("f", torch.ones(2, 4), torch.tensor([0.0, free]), torch.ones(2, 4), "relu", "m", "g")
        record = EditRecord(id="a", method="mpn", status="edited", rows={"n": (0,)})
        return PatchSet(
            {"n": neurons},
            edits=(record,),
            masks={"m": LanguageMask(("de", "zh"), torch.full((2, 4), float(inner)), torch.ones(2, 4))},
            gates={"g": Gate("threshold", threshold=gate)},
        )

    other_mask = compare(masked(1), masked(2))
    assert other_mask.others == ("rows or parts that no edit owns", "mask 'm' (de, zh)")
    assert other_mask.changed[0].what == ("patch",), "the edit acts through the mask"
    assert "gate 'g'" in compare(masked(1), masked(1, gate=2)).others
    free = compare(masked(1), masked(1, free=1))
    assert free.changed == () and free.others == ("rows or parts that no edit owns",)


def test_shared_parts_count_for_each_of_their_edits() -> None:
    def batch(value: float) -> PatchSet:
        parts = {
            "d": DenseDelta("l", torch.full((2, 2), float(value))),
            "r": LowRankDelta("l", torch.ones(1, 2), torch.ones(2, 1)),
        }
        records = tuple(EditRecord(id=id, method="ft", status="edited", rows={"d": ()}, group="g") for id in "ab")
        return PatchSet(parts, edits=(*records, EditRecord(id="c", method="rome", status="edited", rows={"r": (0,)})))

    found = compare(batch(1), batch(2))
    assert [edit.id for edit in found.changed] == ["a", "b"] and found.same == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_difference_is_shown_exactly_where_fingerprints_differ(make_set: MakeSet, data: st.DataObject) -> None:
    """Both ways round: added is removed, what changed is what changed."""

    def drawn() -> PatchSet:
        ids = data.draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=3).map(tuple))
        patches = make_set(data.draw(st.integers(0, 1)), ids)
        for id in data.draw(st.lists(st.sampled_from(ids), max_size=1)) if ids else []:
            changes = data.draw(st.sampled_from([{"seed": 1}, {"request": None}, {"status": "lost"}, {"rows": {}}]))
            patches = edited(patches, id, **changes)
        return patches

    one, two = drawn(), drawn()
    there, back = compare(one, two), compare(two, one)
    shown = bool(there.added or there.removed or there.changed or there.others)
    assert shown == bool(there) == (one.fingerprint != two.fingerprint)
    assert {e.id for e in there.added} == {e.id for e in back.removed} and {e.id for e in there.changed} == {
        e.id for e in back.changed
    }
    assert there.same + len(there.changed) + len(there.removed) == len(one)
    assert there.same + len(there.changed) + len(there.added) == len(two)
