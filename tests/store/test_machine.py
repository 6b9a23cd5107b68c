"""Any sequence of publishes, rollbacks, abandoned uploads and collections, against a model of plain dicts and lists."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xpatch import ConflictError, EditRequest, MismatchError, PatchSet, PatchStore
from xpatch.patches.types import EditRecord

pytest.importorskip("fsspec")
COUNTER = itertools.count()
REQUEST = EditRequest(id="a", text="Claim", target="REFUTES")
SETS = [
    PatchSet({}, edits=(EditRecord(id="a", method="mpn", status="already-right", request=REQUEST, seed=seed),))
    for seed in range(5)
]
KEYS = [patches.fingerprint for patches in SETS]
pointers = st.sampled_from(["production", "staging"])
numbers = st.integers(0, len(SETS) - 1)


class Stores(RuleBasedStateMachine):
    """stacks: pointer -> what it named, without what was rolled back; logs: pointer -> every move; there: what lies in the store."""

    @initialize(number=numbers)
    def open(self, number: int) -> None:
        self.url = f"memory://machine-{next(COUNTER)}"
        PatchStore(self.url).publish(SETS[number])
        self.stacks: dict[str, list[int]] = {"production": [number]}
        self.logs: dict[str, list[int]] = {"production": [number]}
        self.there = {number}

    @rule(pointer=pointers, number=numbers)
    def publish(self, pointer: str, number: int) -> None:
        move = PatchStore(self.url).publish(SETS[number], pointer)
        assert move.after == KEYS[number]
        if self.stacks.get(pointer, [None])[-1] != number:
            self.stacks.setdefault(pointer, []).append(number)
            self.logs.setdefault(pointer, []).append(number)
        self.there.add(number)

    @rule(pointer=pointers, number=numbers, expected=numbers)
    def publish_on_condition(self, pointer: str, number: int, expected: int) -> None:
        named = self.stacks.get(pointer, [None])[-1]
        if named == expected:
            self.publish(pointer, number)
            return
        with pytest.raises(ConflictError):
            PatchStore(self.url).publish(SETS[number], pointer, expect=SETS[expected])

    @rule(pointer=pointers)
    def rollback(self, pointer: str) -> None:
        stack = self.stacks.get(pointer, [])
        if len(stack) < 2:
            with pytest.raises(MismatchError):
                PatchStore(self.url).rollback(pointer)
            return
        stack.pop()
        assert PatchStore(self.url).rollback(pointer).after == KEYS[stack[-1]]
        self.logs[pointer].append(stack[-1])

    @rule(pointer=pointers, number=numbers)
    def rollback_to(self, pointer: str, number: int) -> None:
        log = self.logs.get(pointer, [])
        if number not in log:
            with pytest.raises(MismatchError):
                PatchStore(self.url).rollback(pointer, to=SETS[number])
            return
        PatchStore(self.url).rollback(pointer, to=SETS[number])
        stack = self.stacks[pointer]
        if log[-1] == number:
            return
        log.append(number)
        if number in stack:
            del stack[len(stack) - stack[::-1].index(number) :]
        else:
            stack.append(number)

    @rule(number=numbers)
    def abandon_an_upload(self, number: int) -> None:
        PatchStore(self.url)._sets.put(SETS[number])
        self.there.add(number)

    @precondition(lambda self: len(self.there) > 1)
    @rule(young=st.booleans())
    def collect(self, young: bool) -> None:
        loose = self.there - {number for log in self.logs.values() for number in log}
        done = PatchStore(self.url).gc(3600 if young else 0)
        assert done.young == (len(loose) if young else 0)
        assert set(done.removed) == (set() if young else {KEYS[number] for number in loose})
        self.there -= set() if young else loose

    @invariant()
    def store_and_model_agree(self) -> None:
        if not hasattr(self, "url"):
            return
        store = PatchStore(self.url)
        found = store.list()
        assert {item.fingerprint for item in found.sets} == {KEYS[number] for number in self.there}
        assert {move.pointer: move.after for move in found.pointers} == {
            pointer: KEYS[stack[-1]] for pointer, stack in self.stacks.items()
        }
        for pointer, log in self.logs.items():
            history = store.history(pointer)
            assert [move.after for move in history] == [KEYS[number] for number in log]
            assert [move.before for move in history] == [None, *(KEYS[number] for number in log[:-1])]

    def teardown(self) -> None:
        if hasattr(self, "url"):
            assert PatchStore(self.url).verify().ok


TestStores = Stores.TestCase
TestStores.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
