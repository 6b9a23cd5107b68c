"""Which requests of a call can be tried: a bad one is rejected by name, it does not keep the others from being edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from xpatch.editors.task import Edit
from xpatch.errors import MismatchError
from xpatch.models.names import some
from xpatch.patches.claims import Asked, asked_by, same_answer
from xpatch.patches.jsonl import shorten
from xpatch.patches.requests import EditRequest


@dataclass(frozen=True)
class Admitted:
    """edits: those to train, in the order of their requests. rejected: id of each other request -> why it cannot be tried."""

    edits: tuple[Edit, ...]
    rejected: Mapping[str, str]


def admit(
    requests: Iterable[EditRequest], resolve: Callable[[EditRequest], Edit], index: Callable[[str], int | None]
) -> Admitted:
    """Resolve every request by itself, then compare them with each other.

    resolve: raises `MismatchError` for a request that cannot be tried. index: a target's label index, None where the model has no
    labels. Rejected are requests that cannot be resolved; all that claim different answers for one text (see `claims.Asked`) in a
    language that takes part; and of several that ask for the same in the same texts, all but the first.
    """
    edits: list[Edit] = []
    rejected: dict[str, str] = {}
    for request in requests:
        try:
            edits.append(resolve(request))
        except MismatchError as error:
            rejected[request.id] = str(error)
    rejected.update(_contradictory(edits, index))
    rejected.update(_repeated([edit for edit in edits if edit.request.id not in rejected], index))
    return Admitted(tuple(edit for edit in edits if edit.request.id not in rejected), rejected)


def _contradictory(edits: Sequence[Edit], index: Callable[[str], int | None]) -> dict[str, str]:
    claims: dict[tuple[str, str, str], list[tuple[str, Asked]]] = {}
    for edit in edits:
        for asked in asked_by(edit.request):
            if asked.language in edit.languages:
                claims.setdefault(asked.claim, []).append((edit.request.id, asked))
    found: dict[str, str] = {}
    for made in claims.values():
        if all(same_answer(made[0][1].target, asked.target, index) for _, asked in made[1:]):
            continue
        for id, asked in made:
            others = {other: its.target for other, its in made if not same_answer(asked.target, its.target, index)}
            found.setdefault(id, _contradiction(id, asked, others))
    return found


def _contradiction(id: str, asked: Asked, others: Mapping[str, str]) -> str:
    named = [f"{other!r}, which asks for {target!r}" for other, target in others.items() if other != id]
    against = some(named, 3) if named else f"itself, by asking for {others[id]!r} too"
    return (
        f"contradicts {against}: {shorten(repr(asked.probe.text))} ({asked.language}) should get {asked.target!r} here; "
        "keep one answer to a text"
    )


def _repeated(edits: Sequence[Edit], index: Callable[[str], int | None]) -> dict[str, str]:
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    for edit in edits:
        before = first.setdefault(_content(edit.request, index), edit.request.id)
        if before != edit.request.id:
            found[edit.request.id] = f"duplicate of {before!r}: the same texts with the same target"
    return found


def _content(request: EditRequest, index: Callable[[str], int | None]) -> object:
    """Equal for requests that ask for the same: every version with its probes, and its target as the model has it."""
    versions = []
    for language, version in sorted(request.versions.items()):
        target = request.target_of(language)
        answer = target if target is None else index(target)
        plain = version.model_copy(update={"target": None})
        versions.append((language, plain, target if answer is None else answer))
    return request.language, tuple(versions)
