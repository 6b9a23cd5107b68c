"""Edits that fire on one text and pull its answer apart: found at work, by leaving each of them out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from xpatch.watch.observe import Question, Report, Watched
from xpatch.watch.texts import Text
from xpatch.watch.units import Unit

NOTABLE = 0.5
COSINE = -0.5


@dataclass(frozen=True)
class Pull:
    """What one edit (or several that cannot be separated) does to the answer on one text.

    raises: the label (or token) whose logit it raises most, against the mean of all. moved: that raise. size: between the label it
    raises most and the one it lowers most, in log-odds.
    """

    set_name: str
    edits: tuple[str, ...]
    raises: str
    moved: float
    size: float


@dataclass(frozen=True)
class Opposition:
    """Two edits that fire on one text and pull its answer apart. answer: the likeliest with both in place; cosine: of their pulls."""

    text: str
    text_pair: str | None
    language: str | None
    answer: str
    first: Pull
    second: Pull
    cosine: float


def oppositions(
    watched: Watched,
    texts: Sequence[Text],
    slot: str,
    *,
    notable: float,
    limit: int,
    batch_size: int,
    progress: Report | None = None,
) -> tuple[list[Opposition], int]:
    """Every opposition with at least one edit of the set called `slot`, which comes first in it; and how many firings were over `limit`.

    An edit's pull is the change of the logits when it alone is switched off, centred: minus its mean over the labels, on which no
    probability depends. It is notable where its largest entry is above its smallest by at least `notable` (log-odds). Two notable
    pulls oppose where they raise different labels most, or where their cosine is below -0.5.
    """
    firing: dict[int, list[Unit]] = {}
    left_out = 0
    plain = [Question(text) for text in texts]
    for seen in watched.ask(plain, batch_size=batch_size, with_scores=True, stage="firing", progress=progress):
        units = sorted((fired.unit for fired in seen.fired), key=lambda unit: unit.set_name != slot)
        if len(units) > 1 and units[0].set_name == slot:
            firing[seen.number] = units[:limit]
            left_out += len(units[limit:])
    questions: list[Question] = []
    asked_of: list[
        tuple[int, int]
    ] = []  # of each question: the text's number, and the unit's among those that fire (-1: none)
    for number, units in firing.items():
        questions += [plain[number], *(Question(texts[number], unit) for unit in units)]
        asked_of += [(number, -1), *((number, index) for index in range(len(units)))]
    found: dict[int, list[Opposition]] = {}
    waiting: dict[int, dict[int, torch.Tensor]] = {}
    for seen in watched.ask(questions, batch_size=batch_size, stage="effects", progress=progress):
        number, index = asked_of[seen.number]
        logits = waiting.setdefault(number, {})
        logits[index] = seen.logits
        if len(logits) == len(firing[number]) + 1:  # a text's questions come together, so few texts wait at a time
            found[number] = list(_of_text(watched, texts[number], firing[number], waiting.pop(number), slot, notable))
    return [one for number in sorted(found) for one in found[number]], left_out


def _of_text(
    watched: Watched, text: Text, units: Sequence[Unit], logits: Mapping[int, torch.Tensor], slot: str, notable: float
) -> Iterator[Opposition]:
    served = logits[-1]
    (answer,) = watched.reader.top(served)
    pulls = {index: _centred(served - logits[index]) for index in range(len(units))}
    strong = [index for index, pull in pulls.items() if float(pull.max() - pull.min()) >= notable]
    for one, two in itertools.combinations(strong, 2):  # the set's own units are first
        cosine = float(torch.nn.functional.cosine_similarity(pulls[one], pulls[two], dim=0))
        apart = bool(pulls[one].argmax() != pulls[two].argmax()) or cosine < COSINE
        if units[one].set_name == slot and apart:
            first, second = (_pull(watched, units[index], pulls[index]) for index in (one, two))
            probe = text.probe
            yield Opposition(probe.text, probe.text_pair, text.language, answer.label, first, second, round(cosine, 4))


def _centred(moved: torch.Tensor) -> torch.Tensor:
    return moved - moved.mean() if len(moved) > 1 else moved


def _pull(watched: Watched, unit: Unit, moved: torch.Tensor) -> Pull:
    label = watched.reader.name(int(moved.argmax()))
    return Pull(unit.set_name, unit.edits, label, float(moved.max()), float(moved.max() - moved.min()))
