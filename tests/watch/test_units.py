"""Which edits can be switched off alone, and which rows go with them."""

from __future__ import annotations

import torch

from xpatch import DenseDelta, LowRankDelta, PatchNeurons, PatchSet
from xpatch.patches.types import EditRecord
from xpatch.watch.units import WHOLE, listed, units_of


def record(id: str, rows=None, group: str | None = None, status="edited") -> EditRecord:
    return EditRecord(id=id, method="by-hand", status=status, rows=rows or {}, group=group)


def neurons(count: int) -> PatchNeurons:
    return PatchNeurons("ffn", torch.randn(count, 4), torch.zeros(count), torch.randn(count, 4), "relu")


def plain(units):
    return [(unit.edits, dict(unit.rows)) for unit in units]


def test_each_edit_with_its_rows_and_nobodys_rows_last():
    patches = PatchSet(
        parts={"n": neurons(5), "m": neurons(2)},
        edits=(record("a", {"n": (0, 3)}), record("b", {"n": (1,), "m": (0,)}), record("c", status="already-right")),
    )
    assert plain(units_of("s", patches)) == [
        (("a",), {"n": (0, 3)}),
        (("b",), {"n": (1,), "m": (0,)}),
        ((), {"n": (2, 4), "m": (1,)}),
    ]
    assert [unit.label for unit in units_of("s", patches)] == ["s/a", "s/b", "s/(no edit)"]


def test_a_group_is_one_unit():
    edits = (record("a", {"n": (0,)}, "g"), record("b", {"n": (1,)}), record("c", {"n": (2,)}, "g"))
    assert plain(units_of("s", PatchSet(parts={"n": neurons(3)}, edits=edits))) == [
        (("a", "c"), {"n": (0, 2)}),
        (("b",), {"n": (1,)}),
    ]


def test_edits_that_share_a_part_are_one_unit_across_several_parts():
    dense, lowrank = DenseDelta("down", torch.randn(4, 4)), LowRankDelta("down", torch.randn(2, 4), torch.randn(4, 2))
    edits = (record("a", {"d": ()}), record("b", {"d": (), "l": ()}), record("c", {"l": ()}), record("e", {"n": (0,)}))
    patches = PatchSet(parts={"d": dense, "l": lowrank, "n": neurons(1)}, edits=edits)
    assert plain(units_of("s", patches)) == [(("a", "b", "c"), {"d": WHOLE, "l": WHOLE}), (("e",), {"n": (0,)})]


def test_a_set_without_a_ledger_is_nobodys():
    patches = PatchSet(parts={"n": neurons(2), "d": DenseDelta("down", torch.randn(4, 4)), "empty": neurons(0)})
    assert plain(units_of("s", patches)) == [((), {"n": (0, 1), "d": WHOLE})]


def test_names_in_few_words():
    assert [listed(ids) for ids in ((), ("a",), ("a", "b", "c"))] == ["(no edit)", "a", "a and 2 more"]
