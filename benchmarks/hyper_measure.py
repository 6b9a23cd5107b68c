"""What a trained editor reaches on validation facts: each edit alone, as the papers measure, and all edits in one set."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xpatch
from xpatch import EditRequest
from xpatch.evaluation.predict import predict
from xpatch.patches.requests import Probe
from xpatch.zoo.verifier import data

from .protocol import UNSEEN, bundled

OTHERS = 2  # other claims per edit and language
Report = Callable[[str, int, int], None]


def flips(model: Any, tokenizer: Any, edits: int | None = None) -> list[EditRequest]:
    """One claim per validation subject, to get the label the model does not give its English text; unseen wordings as rephrases."""
    cases = list(bundled(edits, 0, "validation").cases)
    answers = predict(model, tokenizer, [case.versions["en"].probe for case in cases])
    other = {data.LABELS[0]: data.LABELS[1], data.LABELS[1]: data.LABELS[0]}
    return [case.model_copy(update={"target": other[answer]}) for case, answer in zip(cases, answers, strict=True)]


@dataclass(frozen=True)
class Asked:
    """What every editor is asked. requests: the flips; groups: of each flip, (kind, language, probe); before: the answers to these
    without an edit; edits: the limit given."""

    requests: Sequence[EditRequest]
    groups: Sequence[Sequence[tuple[str, str, Probe]]]
    before: Sequence[Sequence[str]]
    edits: int | None


def asked_of(model: Any, tokenizer: Any, edits: int | None = None) -> Asked:
    """The questions, and the model's own answers."""
    requests = flips(model, tokenizer, edits)
    groups = [_questions(requests, number) for number in range(len(requests))]
    answers = iter(_ask(model, tokenizer, [question for group in groups for question in group]))
    return Asked(requests, groups, [[next(answers) for _ in group] for group in groups], edits)


def alone(
    model: Any, tokenizer: Any, method: str, folder: Path, questions: Asked, report: Report | None = None
) -> dict[str, Any]:
    """Flips of English claims, each edit on the model by itself; percent. clg: the same claim in another language; unseen: wordings
    the editor was not given; unchanged: other validation claims answered as before. before: clg without an edit (languages in
    which the model already gives the new label)."""
    requests, groups, before = questions.requests, questions.groups, questions.before
    patches = xpatch.edit(
        model, tokenizer, requests, method=method, preset="paper", editor=str(folder), progress=report or False
    )
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("before", "clg", "unseen", "unchanged")}
    asked: dict[str, Counter[str]] = {name: Counter() for name in counts}
    for number, (request, group) in enumerate(zip(requests, groups, strict=True)):
        xpatch.apply(model, patches.select([request.id]), name="alone")
        try:
            after = _ask(model, tokenizer, group)
        finally:
            xpatch.remove(model, "alone")
        for (kind, language, _), old, new in zip(group, before[number], after, strict=True):
            good = new == old if kind == "unchanged" else new == request.target
            counts[kind][language] += good
            asked[kind][language] += 1
            if kind == "clg":
                counts["before"][language] += old == request.target
                asked["before"][language] += 1
        if report is not None:
            report("measuring", number + 1, len(requests))
    found: dict[str, Any] = {"edits": len(requests), "success": _percent(counts["clg"]["en"], asked["clg"]["en"])}
    for kind in counts:
        by_language = {language: _percent(counts[kind][language], asked[kind][language]) for language in data.LANGUAGES}
        found[kind] = by_language
        found[f"{kind}_avg"] = round(sum(by_language.values()) / len(by_language), 2)
    return found


def together(
    model: Any, tokenizer: Any, method: str, folder: Path, asked: Asked, report: Report | None = None
) -> dict[str, Any]:
    """All flips in one set, and all corrections of wrong English answers in one set; the same measures with every edit in place."""
    found = {}
    wanted = {"flips": list(asked.requests), "corrections": list(bundled(asked.edits, 0, "validation").cases)}
    for name, requests in wanted.items():
        patches = xpatch.edit(model, tokenizer, requests, method=method, editor=str(folder), progress=report or False)
        edited = [record.id for record in patches if record.rows]
        chosen = [request for request in requests if request.id in edited]
        others = [request for request in requests if request.id not in edited] if name == "corrections" else []
        group = [
            (kind, language, probe)
            for request in chosen
            for kind, language, probe in _own(request)
        ]  # fmt: skip
        targets = [request.target for request in chosen for _ in _own(request)]
        stay = [
            ("unchanged", language, version.probe)
            for request in others
            for language, version in request.versions.items()
        ] or _unrelated()
        before = _ask(model, tokenizer, stay)
        xpatch.apply(model, patches, name="together")
        try:
            after, kept = _ask(model, tokenizer, group), _ask(model, tokenizer, stay)
        finally:
            xpatch.remove(model, "together")
        row: dict[str, Any] = {"asked": len(requests), "changes": len(edited)}
        row["statuses"] = dict(Counter(record.status for record in patches))
        for kind in ("clg", "unseen"):
            marks = [
                (language, answer == target)
                for (sort, language, _), answer, target in zip(group, after, targets, strict=True)
                if sort == kind
            ]
            row[kind] = _by_language(marks)
        row["unchanged"] = _by_language(
            [(language, old == new) for (_, language, _), old, new in zip(stay, before, kept, strict=True)]
        )
        found[name] = row
    return found


def _own(request: EditRequest) -> list[tuple[str, str, Probe]]:
    return [
        (kind, language, probe)
        for language, version in request.versions.items()
        for kind, probes in (("clg", (version.probe,)), ("unseen", version.rephrases))
        for probe in probes
    ]


def _questions(requests: Sequence[EditRequest], number: int) -> list[tuple[str, str, Probe]]:
    request = requests[number]
    rng = random.Random(f"others:{request.id}")
    others = [
        ("unchanged", language, rng.choice([r for r in requests if r is not request]).versions[language].probe)
        for language in request.versions
        for _ in range(OTHERS)
    ]
    return [*_own(request), *others]


def _unrelated() -> list[tuple[str, str, Probe]]:
    """Claims on the classification facts, in a wording no editor was trained on."""
    probes = data.locality("train", templates=UNSEEN[:1], limit=150)
    return [("unchanged", language, probe) for language, found in probes.items() for probe in found]


def _ask(model: Any, tokenizer: Any, group: Sequence[tuple[str, str, Probe]]) -> list[str]:
    return predict(model, tokenizer, [probe for _, _, probe in group], batch_size=64)


def _by_language(marks: Sequence[tuple[str, bool]]) -> Mapping[str, float]:
    good: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for language, mark in marks:
        good[language] += mark
        total[language] += 1
    found = {language: _percent(good[language], total[language]) for language in total}
    return {**found, "avg": round(sum(found.values()) / len(found), 2)} if found else {}


def _percent(good: int, total: int) -> float:
    return round(100 * good / total, 2) if total else 0.0
