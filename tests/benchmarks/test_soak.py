"""The soak's checker catches what it is there for: torn and stale outputs, threads that hang, memory that grows."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading

import pytest
import torch

import xpatch
from xpatch.benchmarks import soak
from xpatch.benchmarks.soak_check import History, Judge, named, table
from xpatch.benchmarks.soak_models import REFUSED, Question, decoder, encoder


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small(subject, *kept, more=()):
    """The subject with these questions alone."""
    chosen = tuple(question for question in subject.questions if question.name in kept)
    assert len(chosen) == len(kept)
    return dataclasses.replace(subject, questions=(*chosen, *more))


def ticking():
    """A clock that goes on by one with every look."""
    return itertools.count().__next__


def test_a_history_knows_what_a_call_may_have_seen():
    history, clock = History(), ticking()
    with history.change("A", clock):  # from 0 to 1
        assert history.label == "A"
    with history.change(None, clock):  # from 2 to 3
        pass
    assert history.possible(-2, -1) == {None}
    assert history.possible(-1, 0.5) == {None, "A"}
    assert history.possible(1.2, 1.8) == {"A"}
    assert history.possible(0.5, 1.8) == {None, "A"}
    assert history.possible(2.5, 2.6) == {"A", None}
    assert history.possible(4, 5) == {None}
    with history.change("A", clock):
        assert history.possible(5, math.inf) == {None, "A"}  # may be visible already, may not be yet


def test_every_state_has_an_answer_of_its_own():
    subject = encoder(3)
    answers = table(subject)
    # A state has an answer for each order in which its sets' sums were formed; no two states share one.
    assert sorted({named(state) for states in answers["plain"].values() for state in states}) == sorted(
        map(named, subject.states)
    )
    assert len(subject.states) == 6 and all(len(states) == 1 for states in answers["plain"].values())
    assert len(answers["disabled"]) == 1
    refused = {named(state) for state in answers["named rows"][REFUSED]}
    assert refused == {"none", "B", "B'"}
    assert not xpatch.status(subject.model).names


def test_states_that_answer_alike_are_an_error():
    subject = small(encoder(0), "plain")
    same = {**subject.sets, "b": {"B": subject.sets["a"]["A"], "B'": subject.sets["b"]["B'"]}}
    with pytest.raises(xpatch.FormatError, match="A, B"):
        table(dataclasses.replace(subject, sets=same))
    patched = dataclasses.replace(subject.questions[0], patched=False)
    with pytest.raises(xpatch.FormatError, match="one answer in every state"):
        table(dataclasses.replace(subject, questions=(patched,)))


@pytest.mark.parametrize("make", [encoder, decoder])
def test_a_mixture_of_two_states_is_torn(make):
    """One row of a batch from the state A, the others from B: every number is right somewhere, the whole is not."""
    subject = small(make(0), "plain")
    question = subject.questions[0]
    expected = table(subject)
    judge = Judge(expected, {name: History() for name in subject.sets})
    answer = {named(state): found for found, states in expected["plain"].items() for state in states}
    assert judge.see(question, answer["none"], 0, 1) == "right"
    row = len(answer["A"]) // 4
    assert judge.see(question, answer["A"][:row] + answer["B"][row:], 0, 1) == "torn"
    assert judge.see(question, answer["A"][:-1] + bytes([answer["A"][-1] ^ 1]), 0, 1) == "torn"  # the last bit
    assert judge.counts == {"outputs": 3, "right": 1, "torn": 2}
    assert [example["verdict"] for example in judge.examples] == ["torn", "torn"]


def test_an_answer_of_the_past_is_stale():
    subject = small(encoder(0), "plain", "named rows")
    plain, by_name = subject.questions
    expected, clock = table(subject), ticking()
    histories = {name: History() for name in subject.sets}
    judge = Judge(expected, histories)
    answer = {named(state): found for found, states in expected["plain"].items() for state in states}
    with histories["a"].change("A", clock):
        pass
    assert judge.see(plain, answer["A"], 2, 3) == "right"
    assert judge.see(plain, answer["none"], 0.5, 3) == "right"  # began before the change was done
    assert judge.see(plain, answer["none"], 2, 3) == "stale"
    assert judge.see(by_name, REFUSED, 2, 3) == "stale"  # "a" was there
    assert judge.counts["refused"] == 1 and judge.seen == {("A", None): 1, (None, None): 2}


def test_a_thread_that_hangs_is_counted_and_shown(capsys):
    release = threading.Event()
    asked = itertools.count()

    def hang():
        if threading.current_thread().name == "reader 1" and next(asked) == 3:
            release.wait(60)
        return b"same"

    def stuck(seed):
        return small(encoder(seed), "plain", more=(Question("hangs", hang, patched=False),))

    try:
        found = soak.run(2, 100_000, progress=False, patience_s=1.5, subjects=(stuck, encoder))
    finally:
        release.set()
    assert found["deadlocks"] == 1 and len(found["models"]) == 1 and not found["restored"]
    assert found["swaps"] < 100_000
    shown = capsys.readouterr().err
    assert "reader 1 made no step" in shown and "in hang" in shown


def test_calls_that_fail_are_counted():
    asked = itertools.count()

    def fail():
        if next(asked) > 12:  # the table asks 12 times
            raise RuntimeError("a defect")
        return b"same"

    found = soak.run(
        2,
        20,
        per_swap=1,
        progress=False,
        subjects=(lambda seed: small(encoder(seed), "plain", more=(Question("x", fail, False),)),),
    )
    assert found["errors"] > 0 and "RuntimeError: a defect" in found["models"][0]["first_error"]
    assert found["torn"] == found["deadlocks"] == 0 and found["swaps"] == 20


def test_memory_that_grows_is_seen():
    kept = []

    def leak():
        kept.append(b"x" * 1_000_000)
        return b"same"

    found = soak.run(
        2,
        200,
        per_swap=1,
        progress=False,
        subjects=(lambda seed: small(encoder(seed), "plain", more=(Question("leaks", leak, False),)),),
    )
    if soak.resident_bytes() is None:
        pytest.skip("this system does not tell the resident memory")
    part = found["models"][0]
    assert found["rss_growth"] == part["rss_growth"] > 2
    assert part["rss_end_mib"] - part["rss_begin_mib"] < len(kept)


def test_too_few_swaps_or_threads():
    with pytest.raises(xpatch.FormatError, match="at least 1 thread and 4 swaps"):
        soak.run(8, 3)
    with pytest.raises(xpatch.FormatError, match="found 0 and 10"):
        soak.run(0, 10)
