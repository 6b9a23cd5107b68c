"""The acceptance gate: what a set does to texts that must not change and to texts that must give their target.

A sequence classifier is asked twice, as its base and with the set alone: a private twin of it, so that the model itself, and whatever
is applied to it, takes no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpatch.errors import ConflictError, FormatError, MismatchError
from xpatch.patches.jsonl import read_jsonl, shorten
from xpatch.patches.probes import as_probe
from xpatch.patches.requests import EditRequest, Probe, as_requests
from xpatch.patches.types import PatchSet

Texts = str | Path | Sequence[Any]
Report = Callable[[str, int, int], None]
SHOWN = 5
SHOWN_CHARACTERS = 80
BATCH = 256


@dataclass(frozen=True)
class Question:
    """One text, its language if known, and the class it must give; None: the one the base gives."""

    probe: Probe
    language: str | None
    expected: int | None


def check(
    patches: PatchSet,
    model: Any,
    tokenizer: Any,
    *,
    must_not_change: Texts | None,
    must_hold: Texts | None,
    refused: str,
    report: Report | None = None,
) -> dict[str, int]:
    """Ask; returns how many texts of each kind were found right. The model is not touched.

    refused: how the message of a refusal begins. Raises `ConflictError` listing what moved or did not hold, `FormatError` for
    texts that cannot be read, `MismatchError` for a set that does not fit the model, an unknown label, or a model or tokenizer
    that is missing.
    """
    texts_given = must_not_change is not None or must_hold is not None
    if model is None or (texts_given and tokenizer is None):
        raise MismatchError(
            "publish(must_not_change=..., must_hold=...): expected model= and tokenizer= to ask, found none; "
            "give the model the set was made for, or leave the texts out"
        )
    asked = {
        "must_not_change": [] if must_not_change is None else list(_keep_questions(must_not_change)),
        "must_hold": [] if must_hold is None else list(_hold_questions(model, must_hold)),
    }
    for kind, given in (("must_not_change", must_not_change), ("must_hold", must_hold)):
        if given is not None and not asked[kind]:
            raise FormatError(
                f"{kind} {given if isinstance(given, (str, Path)) else ''}: expected at least one text, found none"
            )
    before, after = _answers(patches, model, tokenizer, [q for kind in asked.values() for q in kind], report)
    lines: list[str] = []
    start = 0
    for kind, questions in asked.items():
        rows = [(q, before[start + i], after[start + i]) for i, q in enumerate(questions)]
        wrong = [row for row in rows if row[2] != (row[1] if row[0].expected is None else row[0].expected)]
        start += len(questions)
        if wrong:
            lines.append(_FAULT[kind].format(wrong=len(wrong), asked=len(questions)))
            lines += [f"  {_line(*row, _labels(model))}" for row in wrong[:SHOWN]]
            lines += [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    if lines:
        lines.append(
            "Train the edits again with these texts as memory (xpatch edit --memory FILE), drop the edits that do it, or change the "
            "texts if the new answers are right."
        )
        raise ConflictError("\n".join([refused, *lines]))
    return {kind: len(questions) for kind, questions in asked.items() if questions}


_FAULT = {
    "must_not_change": "{wrong} of {asked} predictions that must not change did:",
    "must_hold": "{wrong} of {asked} predictions that must hold do not:",
}


def _line(question: Question, before: int, after: int, names: list[str]) -> str:
    text = question.probe.text + (f" | {question.probe.text_pair}" if question.probe.text_pair else "")
    expected = "" if question.expected is None else f", expected {names[question.expected]}"
    return f"[{question.language or 'no language'}] {shorten(text, SHOWN_CHARACTERS)!r}: {names[before]} -> {names[after]}{expected}"


def _labels(model: Any) -> list[str]:
    from xpatch.evaluation.predict import label_names

    return label_names(model)


def _answers(
    patches: PatchSet, model: Any, tokenizer: Any, questions: list[Question], report: Report | None
) -> tuple[list[int], list[int]]:
    """(classes of the base, classes with the set alone), in the order of the questions.

    Asked language by language, because a set with language masks acts on a row by its language.
    """
    from xpatch import api
    from xpatch.evaluation.predict import predict_indices
    from xpatch.watch.twin import twin_of

    before, after = [0] * len(questions), [0] * len(questions)
    done = 0
    twin = twin_of(model)  # whoever calls the model meanwhile never sees the set
    api.apply(twin, patches, name="candidate", tokenizer=tokenizer)
    for language, rows in _chunks(questions):
        probes = [questions[row].probe for row in rows]
        with api.disabled(twin):
            base = predict_indices(twin, tokenizer, probes, batch_size=BATCH).tolist()
        with api.rows(languages=language):
            patched = predict_indices(twin, tokenizer, probes, batch_size=BATCH).tolist()
        for row, was, now in zip(rows, base, patched, strict=True):
            before[row], after[row] = was, now
        done += len(rows)
        if report is not None:
            report("checking", done, len(questions))
    return before, after


def _chunks(questions: list[Question]) -> Iterator[tuple[str | None, list[int]]]:
    languages: dict[str | None, list[int]] = {}
    for row, question in enumerate(questions):
        languages.setdefault(question.language, []).append(row)
    for language, rows in languages.items():
        for start in range(0, len(rows), BATCH):
            yield language, rows[start : start + BATCH]


def _keep_questions(texts: Texts) -> Iterator[Question]:
    for where, item in _items(texts, "must_not_change"):
        probe, language = _probe(item, where)
        yield Question(probe, language, None)


def _hold_questions(model: Any, texts: Texts) -> Iterator[Question]:
    from xpatch.evaluation.predict import label_index

    for where, item in _items(texts, "must_hold"):
        for probe, language, target in _wanted(item, where):
            if target is None:
                raise FormatError(f"{where}: expected a 'target' to hold, found none; give the label or its index")
            yield Question(probe, language, label_index(model, target, where=where))


def _wanted(item: Any, where: str) -> Iterator[tuple[Probe, str | None, str | None]]:
    if isinstance(item, EditRequest) or (isinstance(item, Mapping) and ("id" in item or "versions" in item)):
        try:
            request = as_requests([item])[0]
        except FormatError as error:
            raise FormatError(f"{where}: {str(error).removeprefix('request 1: ')}") from None
        for code, version in request.versions.items():
            target = request.target_of(code)
            yield version.probe, code, target
            for rephrase in version.rephrases:
                yield rephrase, code, target if rephrase.target is None else rephrase.target
        return
    probe, language = _probe(item, where)
    yield probe, language, probe.target


def _items(texts: Texts, word: str) -> Iterable[tuple[str, Any]]:
    if isinstance(texts, (str, Path)):
        return read_jsonl(texts, f"{word} file", "text")
    return ((f"{word}, text {position}", item) for position, item in enumerate(texts, start=1))


def _probe(item: Any, where: str) -> tuple[Probe, str | None]:
    if not isinstance(item, Mapping):
        return as_probe(item, where), None
    fields = dict(item)
    language = fields.pop("language", None)
    if language is not None and (not isinstance(language, str) or not language.strip()):
        raise FormatError(
            f"{where}: language: expected a code such as 'en', found {language!r}; correct or leave it out"
        )
    return as_probe(fields, where), language
