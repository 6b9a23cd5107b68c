"""`xpatch.evaluate`: ask the model before and with the patches, then measure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xpatch.errors import MismatchError
from xpatch.evaluation.metrics import Answers, measure, needed_ids
from xpatch.evaluation.questions import Locality, Question, case_questions, digest, locality_questions
from xpatch.evaluation.readings import Readings
from xpatch.evaluation.report import Report
from xpatch.evaluation.subject import subject_of
from xpatch.patches.requests import EditRequest, as_requests
from xpatch.runtime.attach import runtime_of

ATTACHED_AS = "xpatch-evaluate"


def evaluate(
    model: Any,
    tokenizer: Any,
    cases: Iterable[EditRequest | Mapping[str, Any]] | str | Path,
    patches: Any = None,
    *,
    locality_train: Locality | str | Path | None = None,
    locality_test: Locality | str | Path | None = None,
    locality_groups: Mapping[str, Sequence[str]] | None = None,
    needed: Iterable[str] | None = None,
    baseline: Report | None = None,
    readings: Readings | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Report:
    """Measure a model as it stands, or with `patches` applied for the duration: a sequence classifier, or a language model.

    A language model is right where greedy decoding says the target; a text without a target is unchanged where the model says the same
    as before (`subject.Speaker`). A report's labels are then all that was said.

    cases: edit requests (objects, dicts, a JSONL path) with targets. Their `rephrases` are measured as *unseen* paraphrases:
    give other wordings than those trained on. `locality` and `portability` probes of the versions are measured too.
    patches: a `PatchSet`, or a folder to load. It is removed again, also on an error, so the model is left bit for bit as found.
    locality_train, locality_test: language -> texts about other subjects, like the classifier's training texts and unlike them
    (texts, probes with a gold `target`, or a JSONL path of {"language", "text", "text_pair", "target"}).
    locality_groups: "train" / "test" -> one name for each position of every language's probes; what shares a name (a subject)
    is resampled together. Without it each position is its own group.
    needed: ids of the edits that were needed. Default: those the patches' ledger does not record as already right or rejected, else
    those the unpatched model gets wrong in any language.
    baseline: a report on the same model, cases and locality texts, whose unpatched predictions are reused.
    readings: what this model made of texts before (`xpatch.evaluation.Readings`), for many evaluations of one model: each text is
    read once, and patches at the final FFN are then measured on what was read, with the same answers.

    A set with language masks is asked each text in the language it is filed under. Unpatched predictions are those of `xpatch.disabled`. Intervals are bootstrapped over subjects (or edits) from `seed`.
    Raises `FormatError` (cases or locality that cannot be read, a missing target) and `MismatchError` (a label the model does
    not have, a target it cannot say, ids not among the cases, patches, a baseline or readings that do not fit).
    """
    checked = as_requests(cases)
    subject = subject_of(model, tokenizer)
    questions = [
        *case_questions(subject, checked),
        *locality_questions(subject, "locality_train", locality_train, (locality_groups or {}).get("train")),
        *locality_questions(subject, "locality_test", locality_test, (locality_groups or {}).get("test")),
    ]
    probes = [question.probe for question in questions]
    asked = digest(questions)
    if baseline is not None and baseline.probes != asked:
        raise MismatchError("the baseline report was made on other cases or locality texts; leave `baseline` out")

    if readings is not None and readings.model is not model:
        raise MismatchError("the readings are of another model object; make them with the one that is evaluated")

    from xpatch import api

    if isinstance(patches, (str, Path)):
        patches = api.load(patches)
    with applied(api, model, tokenizer, patches):
        runtime = runtime_of(model)
        masked = runtime is not None and runtime.snapshot.masked
        languages = [question.language for question in questions] if masked else None
        if readings is not None:
            after = readings.after(probes, languages)
        else:
            after = subject.ask(questions, batch_size, languages)
        if baseline is None:
            if readings is not None:
                before = readings.before(probes).tolist()
            else:
                with api.disabled(model):
                    before = subject.ask(questions, batch_size).tolist()
        else:
            earlier = [x for by in baseline.predictions.values() for answers in by.values() for x in answers.before]
            before = subject.recall(baseline.labels, earlier)
            questions, after = _in_report_order(questions, after)
    predictions = collect(questions, before, after.tolist())
    chosen = _needed(checked, patches, needed, predictions)
    return Report(
        model=type(model).__name__,
        labels=subject.labels,
        edits=len(checked),
        needed=tuple(case.id for case in checked if case.id in chosen),
        languages=tuple(dict.fromkeys(language for case in checked for language in case.versions)),
        patches=None if patches is None else str(patches.fingerprint),
        seed=seed,
        probes=asked,
        metrics=measure([(predictions, chosen)], language=checked[0].language, seed=seed),
        predictions=predictions,
    )


def _in_report_order(questions: list[Question], after: Any) -> tuple[list[Question], Any]:
    """Questions and their answers grouped as a report stores them: by kind, then language, each in first-seen order."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for row, question in enumerate(questions):
        kinds.setdefault(question.kind, {}).setdefault(question.language, []).append(row)
    order = [row for by_language in kinds.values() for rows in by_language.values() for row in rows]
    return [questions[row] for row in order], after[order]


def collect(
    questions: Sequence[Question], before: Sequence[int], after: Sequence[int]
) -> dict[str, dict[str, Answers]]:
    """Questions with their answers, as a report stores them."""
    kinds: dict[str, dict[str, list[tuple[Any, ...]]]] = {}
    for q, was, now in zip(questions, before, after, strict=True):
        kinds.setdefault(q.kind, {}).setdefault(q.language, []).append((q.id, q.cluster, q.gold, was, now, q.own))
    names = ("id", "cluster", "gold", "before", "after", "own")
    return {
        kind: {
            language: Answers(**dict(zip(names, zip(*rows, strict=True), strict=True)))
            for language, rows in by_language.items()
        }
        for kind, by_language in kinds.items()
    }


def _needed(
    cases: Sequence[EditRequest], patches: Any, needed: Iterable[str] | None, predictions: Mapping[str, Any]
) -> set[str]:
    known = {case.id for case in cases}
    if needed is not None:
        chosen = set(needed)
        if chosen - known:
            raise MismatchError(f"needed names ids that are no case: {sorted(chosen - known)[:5]}")
        return chosen
    recorded = {record.id: record.status for record in (patches.edits if patches is not None else ())}
    if recorded and not known.isdisjoint(recorded):
        return {case for case in known if recorded.get(case, "already-right") not in ("already-right", "rejected")}
    return needed_ids(predictions)


@contextlib.contextmanager
def applied(api: Any, model: Any, tokenizer: Any, patches: Any) -> Iterator[None]:
    """The set applied for the duration, nothing where it is none."""
    if patches is None or not patches.parts:  # a set whose edits were all right already, or all failed
        yield
        return
    api.apply(model, patches, name=ATTACHED_AS, tokenizer=tokenizer)
    try:
        yield
    finally:
        api.remove(model, ATTACHED_AS)
