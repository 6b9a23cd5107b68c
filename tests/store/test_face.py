"""A store as its users meet it, in every kind of place: publish, get, roll back, compare, list."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from xpatch import ConflictError, FormatError, MismatchError, PatchSet, PatchStore

MakeSet = Callable[..., PatchSet]


def same(one: PatchSet, two: PatchSet) -> bool:
    tensors = two.tensors
    return (
        one.fingerprint == two.fingerprint
        and one.edits == two.edits
        and one.name == two.name
        and all(torch.equal(tensor, tensors[key]) for key, tensor in one.tensors.items())
    )


def test_what_is_published_is_what_everybody_gets(new_store: Callable[[], PatchStore], make_set: MakeSet) -> None:
    first, second = make_set(0, name="fixes"), make_set(1)
    move = new_store().publish(first, message="capital of X", author="ann")
    assert (move.pointer, move.number, move.action, move.before, move.after) == (
        "production",
        1,
        "publish",
        None,
        first.fingerprint,
    )
    assert (move.author, move.message, dict(move.checked)) == ("ann", "capital of X", {})
    assert move.time.endswith("+00:00")
    reader = new_store()
    assert same(reader.get(), first)
    new_store().publish(second)
    assert same(reader.get(), second)
    for ref in (first.fingerprint, first.fingerprint[:4], first.fingerprint[:12], first):
        assert same(reader.get(ref), first)
    assert reader.resolve("production") == second.fingerprint == reader.current().after


def test_an_object_is_an_ordinary_patch_folder(local: PatchStore, make_set: MakeSet) -> None:
    patches = make_set(name="fixes")
    local.publish(patches)
    folder = Path(local.url) / "sets" / patches.fingerprint[:2] / patches.fingerprint
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "patch_config.json",
        "patch_model.safetensors",
    ]
    assert same(xpatch.load(folder), patches)
    PatchStore("memory://objects").publish(patches)
    assert same(xpatch.load(f"memory://objects/sets/{patches.fingerprint[:2]}/{patches.fingerprint}"), patches)


def test_a_folder_is_published_as_well(local: PatchStore, make_set: MakeSet, tmp_path: Path) -> None:
    patches = make_set()
    xpatch.save(patches, tmp_path / "fixes")
    assert local.publish(tmp_path / "fixes").after == patches.fingerprint
    assert local.get().name == "fixes"


def test_publishing_again_what_is_served_is_no_new_move(store: PatchStore, make_set: MakeSet) -> None:
    move = store.publish(make_set(0), message="once")
    assert store.publish(make_set(0), message="twice") == move
    assert len(store.history()) == 1


def test_a_pointer_of_its_own_and_promotion(store: PatchStore, make_set: MakeSet) -> None:
    store.publish(make_set(0))
    store.publish(make_set(1), "staging", "try")
    assert same(store.get(), make_set(0)) and same(store.get("staging"), make_set(1))
    move = store.publish(store.get("staging"))
    assert (move.number, move.before) == (2, make_set(0).fingerprint) and same(store.get(), make_set(1))


def test_rollback_goes_back_and_back_again(store: PatchStore, make_set: MakeSet) -> None:
    a, b, c = (make_set(seed) for seed in range(3))
    for patches in (a, b, c):
        store.publish(patches)
    move = store.rollback(message="c hurts", author="bo")
    assert (move.number, move.action, move.before, move.after) == (4, "rollback", c.fingerprint, b.fingerprint)
    assert (move.author, move.message) == ("bo", "c hurts")
    assert store.rollback().after == a.fingerprint, "not back to c, which was rolled back"
    with pytest.raises(MismatchError, match="expected 1 earlier to go back to, found 0"):
        store.rollback()
    assert store.rollback(to=c.fingerprint[:6]).after == c.fingerprint, "forward again"
    assert store.rollback().after == a.fingerprint
    assert [move.after for move in store.history()] == [p.fingerprint for p in (a, b, c, b, a, c, a)]
    assert [move.number for move in store.history()] == list(range(1, 8))


def test_rollback_by_steps(store: PatchStore, make_set: MakeSet) -> None:
    sets = [make_set(seed) for seed in range(4)]
    for patches in sets:
        store.publish(patches)
    assert store.rollback(steps=3).after == sets[0].fingerprint
    for steps in (0, -1, True, 1.5):
        with pytest.raises(MismatchError, match="steps"):
            store.rollback(steps=steps)  # type: ignore[arg-type]


def test_rollback_only_to_what_the_pointer_has_named(store: PatchStore, make_set: MakeSet) -> None:
    store.publish(make_set(0))
    store.publish(make_set(1), "staging")
    with pytest.raises(MismatchError, match="expected a set it has named before"):
        store.rollback(to=make_set(1))
    assert store.rollback(to="production") == store.current(), "where it is: no move"


def test_expect_guards_a_move(store: PatchStore, make_set: MakeSet) -> None:
    a, b, c = (make_set(seed) for seed in range(3))
    assert store.publish(a, expect=None).number == 1
    with pytest.raises(ConflictError) as refused:
        store.publish(c, expect=None)
    assert a.fingerprint[:12] in str(refused.value) and c.fingerprint[:12] in str(refused.value)
    store.publish(b, expect=a.fingerprint[:8])
    with pytest.raises(
        ConflictError, match=f"expected it to name {a.fingerprint[:12]}, found {b.fingerprint[:12]}.*xpatch store diff"
    ):
        store.publish(c, expect=a)
    with pytest.raises(ConflictError):
        store.rollback(expect=a)
    assert store.current().after == b.fingerprint and len(store.list().sets) == 2, "a refused set is not uploaded"


def test_listing(store: PatchStore, make_set: MakeSet) -> None:
    a, b = make_set(0, ids=("a", "b"), name="fixes"), make_set(1)
    store.publish(a, message="first")
    store.publish(b, "staging")
    found = store.list()
    assert [move.pointer for move in found.pointers] == ["production", "staging"]
    assert [item.fingerprint for item in found.sets] == [b.fingerprint, a.fingerprint], "newest first"
    stored = found.sets[1]
    assert (stored.name, stored.edits, stored.languages, stored.nbytes) == ("fixes", 2, ("de", "en"), a.nbytes)
    assert stored.pointers == ("production",) and stored.published == store.current().time
    text = str(found)
    assert "2 pointers, 2 sets" in text and a.fingerprint[:12] in text and "first" in text


def test_answers_are_frozen_and_readable(local: PatchStore, make_set: MakeSet) -> None:
    local.publish(make_set(0), message="why", author="ann")
    local.publish(make_set(1))
    for answer in (local.current(), local.history(), local.list(), local.gc(), local.verify(), local.diff(make_set(0))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            answer.pointer = "x"  # type: ignore[union-attr, misc]
        assert str(answer) and "Move(" not in str(answer)
    assert str(local.history()).splitlines()[0].startswith("production #2"), "newest first"
    assert "why" in str(local.history()) and "ann" in str(local.history())
    assert local.history()[0].message == "why" and repr(local) == f"PatchStore({local.url!r})"


def test_diff_takes_names_prefixes_and_sets(store: PatchStore, make_set: MakeSet) -> None:
    a, b = make_set(0), make_set(0, ids=("a", "b"))
    store.publish(a)
    store.publish(b)
    for before in (a, a.fingerprint[:10]):
        assert [edit.id for edit in store.diff(before).added] == ["b"]
    assert not store.diff("production", b)


@pytest.mark.parametrize(
    ("ref", "told"),
    [
        ("nothing", "no pointer is called 'nothing'; pointers are production"),
        ("0123", "no pointer is called '0123' and no set's fingerprint begins with it"),
        ("0" * 64, "no set's fingerprint begins with it"),
        ("ab", "at least 4 characters of a fingerprint, found 'ab'"),
        ("../sets", "expected a pointer's name or the start of a fingerprint, found '../sets'"),
        ("", "expected a pointer's name, a fingerprint or a PatchSet, found ''"),
        (7, "found 7"),
    ],
)
def test_refs_that_name_nothing(local: PatchStore, make_set: MakeSet, ref: Any, told: str) -> None:
    local.publish(make_set())
    with pytest.raises(MismatchError, match=told):
        local.get(ref)


def test_ambiguous_prefix(local: PatchStore, make_set: MakeSet) -> None:
    seen: dict[str, PatchSet] = {}
    for seed in itertools.count():  # some hundred sets until two begin alike
        patches = make_set(seed)
        twin = seen.setdefault(patches.fingerprint[:4], patches)
        if twin is not patches:
            break
    local.publish(twin)
    local.publish(patches)
    start = patches.fingerprint[:4]
    with pytest.raises(MismatchError, match=f"found '{start}', the start of 2: .*give more of it") as refused:
        local.get(start)
    assert patches.fingerprint[:12] in str(refused.value) and twin.fingerprint[:12] in str(refused.value)
    assert local.get(patches.fingerprint[:16]).fingerprint == patches.fingerprint


@pytest.mark.parametrize("pointer", ["", "a/b", "..", "a b", "x" * 101, "deadbeef", "0123456789", 5, "é"])
def test_names_a_pointer_cannot_have(local: PatchStore, make_set: MakeSet, pointer: Any) -> None:
    with pytest.raises(FormatError, match="pointer, name"):
        local.publish(make_set(), pointer)
    assert not Path(local.url).exists()


def test_names_that_differ_in_case_only(local: PatchStore, make_set: MakeSet) -> None:
    local.publish(make_set(0), "Canary")
    with pytest.raises(ConflictError, match="'Canary', and 'canary' differs from it in case only"):
        local.publish(make_set(1), "canary")


def test_a_pointer_wins_over_a_fingerprint_that_begins_with_its_name(local: PatchStore, make_set: MakeSet) -> None:
    patches = make_set(0)
    local.publish(patches)
    local.publish(make_set(1), patches.fingerprint[:5])
    assert local.get(patches.fingerprint[:5]).fingerprint == make_set(1).fingerprint
    assert local.get(patches.fingerprint[:6]).fingerprint == patches.fingerprint


def test_what_cannot_be_published(local: PatchStore) -> None:
    with pytest.raises(MismatchError, match="expected a PatchSet or a patch folder, found dict"):
        local.publish({})  # type: ignore[arg-type]


def test_unknown_pointer(local: PatchStore, make_set: MakeSet) -> None:
    local.publish(make_set())
    for ask in (local.current, local.history, local.rollback):
        with pytest.raises(MismatchError, match="no pointer is called 'canary'; pointers are production"):
            ask("canary")


def test_signatures_of_the_same_set_come_together(local: PatchStore, make_set: MakeSet) -> None:
    from xpatch.patches.signatures import Signature

    plain = make_set()
    local.publish(plain)

    def signed(key: str) -> PatchSet:
        return dataclasses.replace(plain, signatures=(Signature(key * 64, plain.fingerprint, "0" * 128),))

    for key in ("a", "b"):
        local.publish(signed(key))
    assert sorted(each.key_id[0] for each in local.get().signatures) == ["a", "b"]
    assert len(local.history()) == 1 and local.verify().ok


def test_only_what_a_trusted_key_has_signed(store: PatchStore, make_set: MakeSet, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from xpatch.patches.signing import generate_key, sign

    for name in ("ours", "theirs"):
        generate_key(tmp_path / name)
    ours, theirs = tmp_path / "ours.pub", tmp_path / "theirs.pub"
    store.publish(make_set())
    with pytest.raises(FormatError, match="expected a signature, found none"):
        store.get(trusted_keys=ours)
    store.publish(sign(make_set(), tmp_path / "ours"))
    assert store.get(trusted_keys=[theirs, ours]).fingerprint == make_set().fingerprint
    with pytest.raises(FormatError, match="expected a signature by one of 1 trusted keys"):
        store.get(trusted_keys=theirs)
