"""What an output may be: the answers of every state, computed beforehand, and which states a call may have seen."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import permutations, product
from typing import Any

import xpatch

from .soak_models import REFUSED, Answer, Question, State, Subject

Table = Mapping[str, Mapping[Answer, set[State]]]  #: question -> answer -> the states that give it


def table(subject: Subject) -> Table:
    """Ask everything in every state, reached in every order, in this thread alone; leave the model without patches.

    Raises `FormatError` where two states answer a question alike: the soak could not tell them apart.
    """
    found: dict[str, dict[Answer, set[State]]] = {question.name: {} for question in subject.questions}
    for state, order in product(subject.states, permutations(range(len(subject.sets)))):
        labels = list(zip(subject.sets, state, strict=True))
        for name, label in (labels[index] for index in order):  # sums are formed in the order of application
            if label is not None:
                subject.put(name, label, None)
        for question in subject.questions:
            found[question.name].setdefault(question.ask(), set()).add(state)
            if question.of is not None and dict(labels)[question.of] is None:
                found[question.name].setdefault(REFUSED, set()).add(state)
        xpatch.remove(subject.model)
    for question in subject.questions:
        _check_distinct(subject, question, found[question.name])
    return found


class History:
    """What one set name held and when: written by the one thread that changes it, read by all. Times from one clock."""

    def __init__(self, label: str | None = None) -> None:
        self._changes: list[tuple[float, list[float], str | None]] = [(-math.inf, [-math.inf], label)]

    @property
    def label(self) -> str | None:
        """What it holds, or will when the change in hand is done."""
        return self._changes[-1][2]

    @contextmanager
    def change(self, label: str | None, clock: Any) -> Iterator[None]:
        """The name begins to hold `label` at some moment within this context."""
        done = [math.inf]
        self._changes.append((clock(), done, label))
        yield
        done[0] = clock()

    def possible(self, begin: float, end: float) -> set[str | None]:
        """Everything a call that ran from `begin` to `end` may have seen."""
        found: set[str | None] = set()
        for started, (finished,), label in reversed(self._changes[:]):
            if started <= end:
                found.add(label)
                if finished <= begin:
                    break  # everything older was over before the call began
        return found


class Judge:
    """Compares outputs with the table and counts. Safe to call from many threads."""

    def __init__(self, expected: Table, histories: Mapping[str, History]) -> None:
        self.expected = expected
        self.histories = histories
        self.counts: Counter[str] = Counter()
        self.seen: Counter[State] = Counter()  #: answers that only one state gives, by state
        self.examples: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def see(self, question: Question, answer: Answer, begin: float, end: float) -> str:
        """Count one answer to a call that ran from `begin` to `end`, as one of

        "torn": the answer of no state at all; "stale": of a state, but of none that was published while the call ran;
        "right" otherwise.
        """
        states = self.expected[question.name].get(answer)
        possible = set(product(*(history.possible(begin, end) for history in self.histories.values())))
        verdict = "torn" if states is None else "right" if states & possible else "stale"
        with self._lock:
            self.counts["refused" if answer == REFUSED else "outputs"] += 1
            self.counts[verdict] += 1
            if states is not None and len(states) == 1:
                self.seen.update(states)
            if verdict != "right" and len(self.examples) < 5:
                seen = sorted(map(named, possible))
                self.examples.append({"verdict": verdict, "question": question.name, "possible": seen})
        return verdict


def named(state: State) -> str:
    """("A", None) -> "A", ("A", "B") -> "A+B", (None, None) -> "none"."""
    return "+".join(label for label in state if label) or "none"


def _check_distinct(subject: Subject, question: Question, answers: Mapping[Answer, set[State]]) -> None:
    given = {answer: states for answer, states in answers.items() if answer != REFUSED}
    alike = any(len(states) > 1 for states in given.values())
    if not question.patched:
        wrong = len(answers) != 1
    elif question.of is not None:  # states that differ in other sets alone may answer alike
        wrong = len(given) < 2
    else:
        wrong = alike or REFUSED in answers
    if wrong:
        groups = "; ".join(", ".join(sorted(map(named, states))) for states in answers.values())
        raise xpatch.FormatError(
            f"soak, {subject.name}, question {question.name!r}: expected "
            f"{'one answer in every state' if not question.patched else 'an answer of its own in every state'}, found "
            f"these states alike: {groups}; choose another seed"
        )
