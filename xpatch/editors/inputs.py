"""From requests, labels and memory as the caller gives them to what editors work on, or one clear message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpatch.editors.task import Edit, Wording
from xpatch.errors import FormatError, MismatchError
from xpatch.patches.probes import as_probe, read_probes
from xpatch.patches.requests import EditRequest, Probe


def labels_of(model: Any, count: int) -> dict[str, int]:
    """Label -> index of a classifier, index strings included. Raises `MismatchError` where there is nothing to choose from."""
    config = model.config
    if count < 2 or getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise MismatchError(
            f"{type(model).__name__} has {count} output(s) and problem type {getattr(config, 'problem_type', None)!r}; "
            "expected a classifier with one answer out of two labels or more"
        )
    names = {
        str(name): int(index) for name, index in (getattr(config, "label2id", None) or {}).items() if int(index) < count
    }
    return {**{str(index): index for index in range(count)}, **names}


def resolve_edits(
    requests: Sequence[EditRequest], labels: Mapping[str, int], languages: Sequence[str] | None
) -> list[Edit]:
    """Requests with label indices, restricted to `languages`; each request's own language comes first.

    Raises `MismatchError` for the first that cannot be resolved; `admission.admit` rejects it instead.
    """
    check_languages(requests, languages)
    return [resolve_edit(request, labels, languages) for request in requests]


def check_languages(requests: Sequence[EditRequest], languages: Sequence[str] | None) -> None:
    """Raise where `languages` is no list of codes (`FormatError`), or names one that no request has (`MismatchError`)."""
    if languages is None:
        return
    if isinstance(languages, str):
        raise FormatError(f"languages: expected a list of language codes, found the string {languages!r}")
    known = {language for request in requests for language in request.versions}
    for language in languages:
        if language not in known:
            raise MismatchError(
                f"language {language!r} occurs in no request; languages there are: {', '.join(sorted(known))}"
            )


def resolve_edit(request: EditRequest, labels: Mapping[str, int], languages: Sequence[str] | None) -> Edit:
    """One request with label indices; a version without text does not take part.

    Raises `MismatchError` for a target that is missing or no label, and for an own-language text without words.
    """
    chosen = taking_part(request, languages)
    versions: list[Wording] = []
    rephrases: list[Wording] = []
    negatives: list[Probe] = []
    for language in chosen:
        version = request.versions[language]
        label = _label(request, language, request.target_of(language), labels)
        versions.append(Wording(version.probe, label, language))
        for probe in version.rephrases:
            own = label if probe.target is None else _label(request, language, probe.target, labels)
            rephrases.append(Wording(probe, own, language))
        negatives += version.locality
    return Edit(request, tuple(versions), tuple(rephrases), tuple(negatives))


def taking_part(request: EditRequest, languages: Sequence[str] | None) -> list[str]:
    """The languages `request` is edited in: its own first, then those of `languages` that it has a text in.

    Raises `MismatchError` where its own text is blank.
    """
    if not request.versions[request.language].text.strip():
        raise MismatchError(
            f"request {request.id!r}, language {request.language!r}: expected a text, found only white space; give the text to edit"
        )
    return [request.language] + [
        language
        for language, version in request.versions.items()
        if language != request.language and (languages is None or language in languages) and version.text.strip()
    ]


def without_text(edit: Edit, languages: Sequence[str] | None) -> list[str]:
    """The languages asked for (by default the request's own) that the edit has no text in."""
    return [code for code in (edit.request.versions if languages is None else languages) if code not in edit.languages]


def _label(request: EditRequest, language: str, target: str | None, labels: Mapping[str, int]) -> int:
    where = f"request {request.id!r}, language {language!r}"
    choices = ", ".join(
        sorted((name for name in labels if not name.isdigit()), key=lambda name: labels[name]) or sorted(labels)
    )
    if target is None:
        raise MismatchError(f"{where}: no target; give the label it should get, one of {choices}")
    if target not in labels:
        raise MismatchError(f"{where}: the model has no label {target!r}; labels: {choices} (or their index)")
    return labels[target]


def as_memory(memory: Mapping[str, Sequence[Any]] | str | Path | None, edits: Sequence[Edit]) -> dict[str, list[Probe]]:
    """language -> probes whose answers must not change: those given (by default the bundled claims) and the edits' locality probes."""
    kept: dict[str, list[Probe]] = {}
    for edit in edits:
        for language, version in edit.request.versions.items():
            kept.setdefault(language, []).extend(version.locality)
    if memory is None:
        given = _bundled(edits)
    elif isinstance(memory, Mapping):
        given = {str(language): _probes(texts, f"memory, language {language!r}") for language, texts in memory.items()}
    else:
        given = read_probes(memory, "memory file")
    for language, probes in given.items():
        kept.setdefault(language, []).extend(probes)
    return kept


def _bundled(edits: Sequence[Edit]) -> dict[str, list[Probe]]:
    """The verifier's classification claims; as pairs of a claim and the next one where the edits are pairs."""
    from xpatch.zoo.verifier.data import memory_texts

    paired = any(version.probe.text_pair is not None for edit in edits for version in edit.versions)
    return {
        language: [
            Probe(text=text, text_pair=after if paired else None)
            for text, after in zip(texts, texts[1:] + texts[:1], strict=True)
        ]
        for language, texts in memory_texts().items()
    }


def _probes(texts: Any, where: str) -> list[Probe]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise FormatError(f"{where}: expected a list of texts, found {type(texts).__name__}")
    return [as_probe(item, f"{where}, text {number}") for number, item in enumerate(texts, start=1)]
