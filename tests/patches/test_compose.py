"""`select`, `drop` and `a + b`: which rows come along, what cannot be separated or joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xpatch.errors import ConflictError, MismatchError
from xpatch.patches import compose, ledger
from xpatch.patches.digests import Digests
from xpatch.patches.identity import BaseIdentity
from xpatch.patches.types import DenseDelta, EditRecord, Gate, LanguageMask, LowRankDelta, PatchNeurons, PatchSet

MakeSet = Callable[..., PatchSet]


def neurons(count: int, start: float = 0.0, **fields: str) -> PatchNeurons:
    ramp = torch.arange(count, dtype=torch.float32) + start
    return PatchNeurons(
        "ffn", ramp[:, None].repeat(1, 3), ramp, ramp[:, None].repeat(1, 3), **{"activation": "relu", **fields}
    )


def lowrank(count: int, **fields: str) -> LowRankDelta:
    ramp = torch.arange(count, dtype=torch.float32)
    return LowRankDelta("linear", ramp[:, None].repeat(1, 4), ramp[None].repeat(2, 1), **fields)


def edit(id: str, group: str | None = None, status: str = "edited", **rows: tuple[int, ...]) -> EditRecord:
    return EditRecord(id=id, method="mpn", status=status, group=group, rows=rows)


def test_select_keeps_order_and_unowned_rows() -> None:
    edits = (edit("a", p=(3,), q=(0,)), edit("b", p=(1, 4)), edit("c", p=(0,), q=(1,)))
    patches = PatchSet({"p": neurons(6), "q": lowrank(2)}, edits=edits, name="n")
    chosen = patches.select(["c", "a"])
    assert [record.id for record in chosen] == ["a", "c"] and chosen.name == "n"
    assert chosen.parts["p"].bias.tolist() == [0, 2, 3, 5]
    assert chosen.edit("a").rows == {"p": (2,), "q": (0,)} and chosen.edit("c").rows == {"p": (0,), "q": (1,)}
    assert patches.drop("b").fingerprint == chosen.fingerprint
    assert patches.select("c").parts["q"].up.tolist() == [[1.0], [1.0]]
    assert patches.select(["a", "b", "c"]).fingerprint == patches.fingerprint
    alone = patches.select("b")
    assert list(alone.parts) == ["p"] and alone.parts["p"].bias.tolist() == [1, 2, 4, 5]
    nobody = patches.select([])
    assert len(nobody) == 0 and nobody.parts["p"].bias.tolist() == [2, 5]
    with pytest.raises(MismatchError, match="edit 'z' is not in this patch set"):
        patches.drop(["a", "z"])


def test_select_drops_masks_and_gates_only_lost_parts_named() -> None:
    mask = LanguageMask(("en",), torch.ones(1, 3), torch.ones(1, 3))
    patches = PatchSet(
        {"p": neurons(1, mask="m"), "q": neurons(1, mask="n")},
        edits=(edit("a", p=(0,)), edit("b", q=(0,))),
        masks={"m": mask, "n": mask, "spare": mask},
    )
    assert list(patches.select("a").masks) == ["m", "spare"]


def test_groups_and_shared_parts_stay_together() -> None:
    dense = DenseDelta("linear", torch.ones(2, 4))
    fields = {"a": (), "b": ()}
    grouped = PatchSet(
        {"p": neurons(2), "d": dense},
        edits=(edit("a", "ft", d=()), edit("b", "ft", d=()), edit("c", p=(0,)), edit("e", p=(1,))),
    )
    with pytest.raises(ConflictError, match="edits 'a' and 'b' belong to group 'ft' and cannot be separated"):
        grouped.drop("b")
    assert list(grouped.drop(["a", "b"]).parts) == ["p"]
    assert grouped.select(list(fields)).parts.keys() == {"d"}
    shared = PatchSet({"l": lowrank(2)}, edits=(edit("a", l=()), edit("b", l=())))
    with pytest.raises(ConflictError, match="share part 'l'"):
        shared.select("a")
    assert not shared.drop(["a", "b"]).parts


def test_part_nobody_names_cannot_be_taken_from() -> None:
    bare = PatchSet(
        {"d": DenseDelta("linear", torch.ones(2, 4))}, edits=(edit("a"), edit("b"), edit("c", status="already-right"))
    )
    with pytest.raises(
        ConflictError, match="edits 'b' cannot be taken from this set: part 'd' at 'linear' has no owner"
    ):
        bare.drop("b")
    assert [record.id for record in bare.drop("c")] == ["a", "b"]
    owning = replace(bare, parts={**bare.parts, "p": neurons(1)}, edits=(edit("a", p=(0,)), edit("b")))
    with pytest.raises(ConflictError, match="edits 'a' cannot be taken"):
        owning.drop("a")
    rows = PatchSet({"p": neurons(2), "q": neurons(1, activation="gelu")}, edits=(edit("a", p=(0,)), edit("b", q=(0,))))
    assert rows.drop("a").drop("b").parts["p"].bias.tolist() == [1]
    with pytest.raises(ConflictError, match="part 'p' at 'ffn' has no owner"):
        PatchSet({"p": neurons(2)}, edits=(edit("a"),)).drop("a")
    hand_made = PatchSet({"d": DenseDelta("linear", torch.ones(2, 4))})
    assert hand_made.select([]).fingerprint == hand_made.fingerprint


def test_add_joins_rows_and_renames() -> None:
    first = PatchSet({"p": neurons(2), "l": lowrank(1)}, edits=(edit("a", p=(0, 1), l=(0,)),), name="n")
    second = PatchSet(
        {"p": neurons(2, 5, activation="gelu"), "x": neurons(1, 9), "l": lowrank(2)},
        edits=(edit("b", p=(1,)), edit("c", x=(0,), p=(0,), l=(0, 1))),
        name="n",
    )
    both = first + second
    assert both.name == "n" and (first + replace(second, name="m")).name is None
    assert [record.id for record in both] == ["a", "b", "c"]
    assert {name: part.count for name, part in both.parts.items()} == {"p": 3, "l": 3, "neurons.1": 2}
    assert both.parts["p"].bias.tolist() == [0, 1, 9] and both.parts["l"].down[:, 0].tolist() == [0, 0, 1]
    assert both.edit("c").rows == {"p": (2,), "neurons.1": (0,), "l": (1, 2)}
    assert both.select("a").fingerprint == first.fingerprint


def test_add_keeps_apart_what_must_not_mix() -> None:
    dense = DenseDelta("linear", torch.ones(2, 4))
    gates = {"g": Gate("threshold", threshold=1.0)}
    one = PatchSet({"d": dense, "p": neurons(1, gate="g")}, edits=(edit("a", "ft", d=(), p=(0,)),), gates=gates)
    two = PatchSet({"d": dense, "p": neurons(1, gate="g")}, edits=(edit("b", "ft", d=(), p=(0,)),), gates=gates)
    both = one + two
    assert list(both.parts) == ["d", "p", "dense.1", "neurons.1"]
    assert [record.group for record in both] == ["ft", "ft.1"]
    assert both.drop("b").fingerprint == one.fingerprint
    batch = PatchSet({"l": lowrank(2)}, edits=(edit("m", l=()),))
    owned = PatchSet({"l": lowrank(1)}, edits=(edit("o", l=(0,)),))
    assert (owned + batch).drop("m").fingerprint == owned.fingerprint
    empty = PatchSet({"l": lowrank(0)}, edits=(edit("r", status="already-right", l=()),))
    assert list((empty + owned).parts) == ["l"] and list((owned + empty).parts) == ["l"]
    assert (owned + empty).drop("r").fingerprint == owned.fingerprint


def test_add_refuses_contradictions() -> None:
    first = PatchSet({"p": neurons(1)}, edits=(edit("a", p=(0,)),))
    with pytest.raises(ConflictError, match="both patch sets hold the edits 'a'"):
        first + first
    mask = LanguageMask(("en",), torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ConflictError, match="mask 'm' differs"):
        replace(first, masks={"m": mask}) + PatchSet({}, masks={"m": replace(mask, inner=torch.zeros(1, 3))})
    with pytest.raises(ConflictError, match="gate 'g' differs"):
        PatchSet({}, gates={"g": Gate("threshold", threshold=1)}) + PatchSet(
            {}, gates={"g": Gate("threshold", threshold=2)}
        )
    assert list((replace(first, masks={"m": mask}) + PatchSet({}, masks={"m": mask})).masks) == ["m"]
    wide = PatchNeurons("ffn", torch.ones(1, 4), torch.ones(1), torch.ones(1, 4), "relu")
    with pytest.raises(MismatchError, match=r"differ in width: expected \(3, 3\) .* found \(4, 4\)"):
        first + PatchSet({"q": wide})
    with pytest.raises(TypeError):
        first + 1


def test_add_compares_bases() -> None:
    digests = [Digests(fp32=c * 64, fp16="d" * 64, bf16="e" * 64) for c in "ab"]
    fields = {"architecture": "Bert", "dtype": "float32"}
    base = BaseIdentity(**fields, all_weights=digests[0], body=digests[0], touched={"l.0": digests[0]})
    other = BaseIdentity(**fields, all_weights=digests[1], body=digests[0])
    with pytest.raises(
        MismatchError, match="made for different bases: weights in fp32: expected aaaaaaaaaaaa, found bbbbbbbbbbbb"
    ):
        PatchSet({}, base=base) + PatchSet({}, base=other)
    assert (PatchSet({}) + PatchSet({}, base=base)).base == base
    served = other.model_copy(update={"dtype": "float16", "touched": {"l.1": digests[0]}})
    together = (PatchSet({}, base=base) + PatchSet({}, base=served)).base
    assert together is not None and set(together.touched) == {"l.0", "l.1"}


@st.composite
def owned_sets(draw: st.DrawFn) -> PatchSet:
    """A part per form with random owners (None: unowned, but never a part without any owner)."""
    ids = [f"e{index}" for index in range(draw(st.integers(1, 5)))]
    parts, rows = {}, {id: {} for id in ids}
    for name, make in (("p", neurons), ("q", neurons), ("l", lowrank)):
        owners = draw(st.lists(st.sampled_from([*ids, None]), max_size=6).filter(lambda x: not x or any(x)))
        parts[name] = make(len(owners), activation="gelu") if name == "q" else make(len(owners))
        for row, owner in enumerate(owners):
            if owner is not None:
                rows[owner][name] = (*rows[owner].get(name, ()), row)
    return PatchSet(
        parts, edits=tuple(edit(id, status="edited" if rows[id] else "already-right", **rows[id]) for id in ids)
    )


def owned_rows(patches: PatchSet) -> dict[tuple[str, str], list[tuple[float, ...]]]:
    """(edit, form and activation) -> its rows, as numbers."""
    result: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for name, owners in ledger.owners(patches).items():
        part = patches.parts[name]
        columns = part.up.T if isinstance(part, LowRankDelta) else torch.cat((part.values, part.bias[:, None]), 1)
        kind = f"{part.form} {getattr(part, 'activation', '')}"
        for row, owner in enumerate(owners):
            result.setdefault((str(owner), kind), []).append(tuple(columns[row].tolist()))
    return {key: sorted(value) for key, value in result.items()}


@given(owned_sets(), st.data())
def test_selections_add_up_to_the_whole(patches: PatchSet, data: st.DataObject) -> None:
    ids = [record.id for record in patches]
    some = data.draw(st.lists(st.sampled_from(ids), unique=True))
    bare = PatchSet(
        {name: part for name, part in patches.select([]).parts.items() if part.count},
    )
    one, other = patches.select(some), patches.drop(some)
    one_by_one = patches
    for id in some:
        one_by_one = one_by_one.drop(id)
    assert one_by_one.fingerprint == other.fingerprint
    together = owned_rows(one + other)
    wanted = owned_rows(patches)
    for key, rows in wanted.items():
        if key[0] == "None":  # rows nobody owns stay with both
            rows = sorted(rows * 2)
        assert together.pop(key) == rows
    assert not together
    assert sum(part.count for part in bare.parts.values()) == sum(len(v) for k, v in wanted.items() if k[0] == "None")


@given(owned_sets())
def test_select_all_and_ownership(patches: PatchSet) -> None:
    assert patches.select([record.id for record in patches]).fingerprint == patches.fingerprint
    assert set(compose.part_ownership(patches).values()) <= {"owned", "empty"}
