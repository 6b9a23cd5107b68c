"""`xpatch.retrain`: train a set's own requests again on an upgraded base, and report what no longer holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xpatch.api import apply, load, remove
from xpatch.editors import edit
from xpatch.editors.progress import Report as Progress
from xpatch.editors.progress import reporting
from xpatch.errors import ConflictError, FormatError, MismatchError
from xpatch.evaluation import evaluate
from xpatch.evaluation.metrics import Predictions
from xpatch.patches.identity import check_fit
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import EditRecord, PatchSet
from xpatch.upgrade.plan import Batch, Plan, check_labels, plan
from xpatch.upgrade.report import EditReport, LanguageReport, Status, UpgradeReport, languages_of, summed

APPLIED_AS = "xpatch-retrain"
SPARED_PROBES = 200_000  #: how many texts of other batches the requests of one batch are given, added up


@dataclass(frozen=True)
class Retrained:
    """patches: the new set, in a form to save and apply; report: what holds."""

    patches: PatchSet
    report: UpgradeReport


def retrain(
    patches: PatchSet | str | Path,
    model: Any,
    tokenizer: Any,
    *,
    method: str | None = None,
    preset: str | None = None,
    seed: int | None = None,
    memory: Mapping[str, Sequence[Any]] | str | Path | None = None,
    languages: Sequence[str] | None = None,
    old: tuple[Any, Any] | None = None,
    progress: bool | Progress | None = None,
    batch_size: int = 64,
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> Retrained:
    """Train the requests in `patches`' ledger again on `model`, the upgraded base, and measure what holds. The model is left as it is.

    patches: a set, or the folder or URL of one. model, tokenizer: as for `xpatch.edit`. Every edit is trained with the method,
    preset, settings and seed of its record; method, preset, seed replace them (recorded settings go with another method or a named
    preset), overrides replace single settings. Edits recorded with different methods or settings are trained one group after the
    other, each on top of those before and sparing the texts of all others, and added up. memory, languages: as for `xpatch.edit`;
    a ledger records neither, so give them again where the set was trained with them. old: (model, tokenizer) of the old base; with it the report says what held
    there with `patches` and is lost now. progress: as for `xpatch.edit`; stages "reading" (texts), "training" (edits), "measuring".
    checkpoint: a folder to go on from after an interruption, as for `xpatch.edit`; each group has a folder in it.

    Left out, and named in the report: requests that were rejected, edits whose request or target was redacted, and those whose
    `expires` is past. An edit right on the new base without a patch stays in the ledger as "already-right" and owns nothing.

    Raises `FormatError` (no ledger, a setting there is not), `MismatchError` (labels the new base lacks, named; a method there is
    not; nothing left to train; an old base `patches` were not made for), `ConflictError` (groups that cannot be one set).
    """
    patches = load(patches) if isinstance(patches, (str, Path)) else patches
    if not isinstance(patches, PatchSet):
        raise MismatchError(f"retrain: expected a PatchSet or its folder; found {type(patches).__name__}")
    todo = plan(patches, method=method, preset=preset, seed=seed, overrides=overrides)
    check_labels(todo.requests, patches, model)
    _check_languages(languages, todo)
    if old is not None:
        _check_old(patches, old)
    with reporting(progress) as report:
        made = _train(todo, model, tokenizer, memory, languages, report, checkpoint)
        steps = 1 if old is None else 2
        report("measuring", 0, steps)
        new = evaluate(model, tokenizer, todo.requests, made, batch_size=batch_size).predictions
        report("measuring", 1, steps)
        before = None
        if old is not None:
            before = evaluate(*old, todo.requests, patches, batch_size=batch_size).predictions
            report("measuring", 2, steps)
    return Retrained(made, _report(patches, made, todo, new, before, type(model).__name__))


def _train(
    todo: Plan,
    model: Any,
    tokenizer: Any,
    memory: Mapping[str, Sequence[Any]] | str | Path | None,
    languages: Sequence[str] | None,
    report: Progress,
    checkpoint: str | Path | None,
) -> PatchSet:
    made: PatchSet | None = None
    done, total = 0, len(todo.requests)
    for number, batch in enumerate(todo.batches, start=1):
        spoken = {language for request in batch.requests for language in request.versions}
        with _on_top_of(made, model, tokenizer):
            part = edit(
                model,
                tokenizer,
                _sparing(batch, todo),
                method=batch.method,
                preset=batch.preset,
                memory=memory,
                seed=batch.seed,
                languages=None if languages is None else [code for code in languages if code in spoken],
                progress=_shifted(report, done, total),
                checkpoint=None if checkpoint is None else Path(checkpoint, f"group-{number}"),
                **batch.settings,
            )
        part = _as_asked(part, batch)
        made = part if made is None else _added(made, part, batch)
        done += len(batch.requests)
    assert made is not None  # a plan has at least one batch
    return made


def _sparing(batch: Batch, todo: Plan) -> list[EditRequest]:
    """The batch's requests, with the texts of the other batches as locality probes: as edits of one call leave each other alone.

    Every request carries them, so a large batch gets a random share of them. Each with its target: a language model's probe without one
    stands for what the model says now.
    """
    others = [
        probe if probe.target is not None else probe.model_copy(update={"target": request.target_of(language)})
        for other in todo.batches
        for request in (other.requests if other is not batch else ())
        for language, version in request.versions.items()
        for probe in (version.probe, *version.rephrases)
    ]
    share = SPARED_PROBES // len(batch.requests)
    chosen = random.Random(batch.seed).sample(others, share) if len(others) > share else others
    sparing = []
    for request in batch.requests:
        own = request.versions[request.language]
        own = own.model_copy(update={"locality": (*own.locality, *chosen)})
        sparing.append(request.model_copy(update={"versions": {**request.versions, request.language: own}}))
    return sparing


def _as_asked(part: PatchSet, batch: Batch) -> PatchSet:
    """The set with the requests as the old ledger has them."""
    asked = {request.id: request for request in batch.requests}
    return replace(part, edits=tuple(replace(record, request=asked[record.id]) for record in part.edits))


def _shifted(report: Progress, done: int, total: int) -> Callable[[str, int, int], None]:
    def heard(stage: str, count: int, of: int) -> None:
        report(stage, done + count, total) if stage in ("training", "resuming") else report(stage, count, of)

    return heard


@contextmanager
def _on_top_of(made: PatchSet | None, model: Any, tokenizer: Any) -> Iterator[None]:
    """The model with what was trained so far, as it will be served beside it."""
    if made is None or not made.parts:
        yield
        return
    apply(model, made, name=APPLIED_AS, tokenizer=tokenizer)
    try:
        yield
    finally:
        remove(model, APPLIED_AS)


def _added(made: PatchSet, part: PatchSet, batch: Batch) -> PatchSet:
    try:
        return made + part
    except (ConflictError, MismatchError) as error:
        before = ", ".join(sorted({record.method for record in made.edits}))
        raise ConflictError(
            f"the edits trained with {batch.method} cannot be one set with those trained with {before}: {error}; train them as two "
            "sets (patches.select(ids)), or all with one method (method=..., --method)"
        ) from None


def _check_languages(languages: Sequence[str] | None, todo: Plan) -> None:
    if languages is None:
        return
    if isinstance(languages, str):
        raise FormatError(f"languages: expected a list of language codes, found the string {languages!r}")
    known = sorted({language for request in todo.requests for language in request.versions})
    for language in languages:
        if language not in known:
            raise MismatchError(f"language {language!r} occurs in no request; languages there are: {', '.join(known)}")


def _check_old(patches: PatchSet, old: tuple[Any, Any]) -> None:
    if not isinstance(old, tuple) or len(old) != 2:
        raise MismatchError(f"old: expected (model, tokenizer) of the old base; found {type(old).__name__}")
    try:
        check_fit(patches, *old)
    except MismatchError as error:
        raise MismatchError(f"the old base is not the one this set was made for: {error}") from None


def _report(
    patches: PatchSet, made: PatchSet, todo: Plan, new: Predictions, before: Predictions | None, model: str
) -> UpgradeReport:
    records = {record.id: record for record in made.edits}
    by_edit = languages_of(new, before, records)
    edits = []
    for record in patches.edits:
        if record.id in todo.left_out:
            word, why = todo.left_out[record.id]
            edits.append(EditReport(id=record.id, status=word, method=record.method, message=why))  # type: ignore[arg-type]
            continue
        now = records[record.id]
        status, message = _verdict(now, by_edit[record.id])
        edits.append(
            EditReport(id=record.id, status=status, method=now.method, message=message, languages=by_edit[record.id])
        )
    return UpgradeReport(
        model=model,
        patches=patches.fingerprint,
        retrained=made.fingerprint,
        compared=before is not None,
        edits=tuple(edits),
        languages=summed(tuple(edits)),
    )


def _verdict(record: EditRecord, languages: Mapping[str, LanguageReport]) -> tuple[Status, str]:
    message = record.message or ""
    if record.status in ("failed", "lost"):
        return record.status, message  # type: ignore[return-value]
    assert record.request is not None  # it was given again
    own = languages[record.request.language]
    if record.status == "rejected":  # two sets of one ledger may contradict or repeat each other
        return ("holds" if own.after == own.texts else "failed"), f"rejected: {message}"
    lost = [f"{code} ({found.lost})" for code, found in languages.items() if found.lost]
    if lost:
        return "lost", f"right before and wrong now, texts and rephrases: {', '.join(lost)}"
    return ("already-right" if record.status == "already-right" and own.before == own.texts else "holds"), message
