"""Each edit by itself on the base: how the hyper-network papers (KnowledgeEditor, MEND, LiME, XME) measure their editors."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xpatch.errors import MismatchError
from xpatch.evaluation.metrics import measure
from xpatch.evaluation.predict import label_names
from xpatch.evaluation.questions import Locality, Question, case_questions, digest, locality_questions
from xpatch.evaluation.readings import Readings
from xpatch.evaluation.report import Report
from xpatch.evaluation.runner import applied, collect
from xpatch.evaluation.subject import Classifier
from xpatch.patches.requests import EditRequest, as_requests
from xpatch.runtime.attach import runtime_of

Progress = Callable[[int, int], None]


def evaluate_alone(
    model: Any,
    tokenizer: Any,
    cases: Iterable[EditRequest | Mapping[str, Any]] | str | Path,
    patches: Any,
    *,
    locality_train: Locality | None = None,
    locality_test: Locality | None = None,
    locality_per_edit: int = 2,
    readings: Readings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """As `evaluate`, but every edit is measured alone on the base, with its own texts and a few texts about other subjects.

    patches: a `PatchSet` whose edits can be separated, or a function that makes the set of one case (for methods whose edits
    cannot; it is called before anything is applied). Cases that the set's ledger records as already right, rejected or not at all
    are left out; those that failed stay and count as they are.
    locality_per_edit: positions of each kind drawn for each edit from `seed`, the same in every language (XME: 4 in all).
    progress: hears `(edits measured, edits)`. Intervals are bootstrapped over the edits' subjects.
    Raises what `evaluate` raises, `ConflictError` for edits that cannot be separated, `MismatchError` where none is left.
    """
    from xpatch import api

    given = chosen = as_requests(cases)
    if not callable(patches):
        recorded = {record.id: record.status for record in patches.edits}
        chosen = [c for c in chosen if recorded.get(c.id, "already-right") not in ("already-right", "rejected")]
    if not chosen:
        raise MismatchError("no case has an edit in the patches that was needed; there is nothing to measure alone")
    read = Readings(model, tokenizer) if readings is None else readings
    subject = Classifier(model, tokenizer)
    others = {
        kind: list(locality_questions(subject, kind, texts, None))
        for kind, texts in (("locality_train", locality_train), ("locality_test", locality_test))
        if texts is not None
    }
    positions = {kind: _by_position(found) for kind, found in others.items()}
    questions: list[Question] = []
    after: list[int] = []
    with _hooks_kept(api, model):
        for number, case in enumerate(chosen):
            one = patches(case) if callable(patches) else patches.select([case.id])
            asked = [*case_questions(subject, [case])]
            asked += _drawn(positions, case, asked[0].cluster, locality_per_edit, seed)
            languages = [q.language for q in asked] if one.masks else None
            with applied(api, model, tokenizer, one):
                after += read.after([q.probe for q in asked], languages).tolist()
            questions += asked
            if progress is not None:
                progress(number + 1, len(chosen))
    before = read.before([q.probe for q in questions]).tolist()
    predictions = collect(questions, before, after)
    ids = tuple(case.id for case in chosen)
    return Report(
        model=type(model).__name__,
        labels=tuple(label_names(model)),
        edits=len(chosen),
        needed=ids,
        languages=tuple(dict.fromkeys(language for case in chosen for language in case.versions)),
        patches=None if callable(patches) else str(patches.fingerprint),
        seed=seed,
        # Of all that could be asked: reports of several seeds can be pooled.
        probes="alone-" + digest([*case_questions(subject, given), *(q for found in others.values() for q in found)]),
        metrics=measure([(predictions, set(ids))], language=chosen[0].language, seed=seed),
        predictions=predictions,
    )


@contextlib.contextmanager
def _hooks_kept(api: Any, model: Any) -> Iterator[None]:
    """The first apply on a model looks for everything that was compiled with it; once is enough."""
    if runtime_of(model) is not None:
        yield
        return
    api.prepare(model)
    try:
        yield
    finally:
        api.prepare(model, off=True)


def _by_position(questions: Iterable[Question]) -> list[list[Question]]:
    """Questions of one kind, grouped by their position: one of every language."""
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.id, []).append(question)
    return list(found.values())


def _drawn(
    others: Mapping[str, Sequence[Sequence[Question]]], case: EditRequest, cluster: str, count: int, seed: int
) -> list[Question]:
    """`count` positions of each kind for one edit, named after it."""
    found: list[Question] = []
    for kind, positions in others.items():
        rng = random.Random(f"{seed}:{kind}:{case.id}")
        for position in rng.sample(range(len(positions)), min(count, len(positions))):
            for q in positions[position]:
                found.append(Question(q.kind, q.language, f"{case.id}:{q.id}", cluster, q.own, q.gold, q.probe))
    return found
