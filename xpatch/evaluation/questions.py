"""What an evaluation asks: the texts of the cases and the texts about other subjects, read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xpatch.errors import FormatError
from xpatch.patches.probes import as_probe, read_probes
from xpatch.patches.requests import EditRequest, Probe

Locality = Mapping[str, Sequence["Probe | str | Mapping[str, Any]"]]


@dataclass(frozen=True)
class Question:
    """One text to ask: kind and language it counts under, whose it is, and its right class (-1 where unknown)."""

    kind: str
    language: str
    id: str
    cluster: str
    own: bool
    gold: int
    probe: Probe


class Answering(Protocol):
    """Numbers right answers; see `subject`."""

    def gold(self, target: str, probe: Probe, language: str, where: str) -> int: ...


def case_questions(subject: Answering, cases: Sequence[EditRequest]) -> Iterator[Question]:
    """Every text of the cases. Raises `FormatError` for a missing target, `MismatchError` for one the model cannot give."""
    for case in cases:
        cluster = case.versions[case.language].subject or case.id
        for language, version in case.versions.items():
            target = case.target_of(language)
            if target is None:
                raise FormatError(
                    f"case {case.id!r}: version {language!r} has no target; an evaluation case needs the right answer"
                )
            where = f"case {case.id!r}, version {language!r}"
            gold = subject.gold(target, version.probe, language, where)
            own = language == case.language
            yield Question("edit", language, case.id, cluster, own, gold, version.probe)
            for kind, probes, default in (
                ("rephrase", version.rephrases, gold),
                ("portability", version.portability, gold),
                ("near", version.locality, -1),
            ):
                for probe in probes:
                    wanted = probe.target if probe.target is not None or default < 0 else target
                    expected = -1 if wanted is None else subject.gold(wanted, probe, language, f"{where}, {kind}")
                    yield Question(kind, language, case.id, cluster, own, expected, probe)


def locality_questions(
    subject: Answering, kind: str, locality: Locality | str | Path | None, groups: Sequence[str] | None
) -> Iterator[Question]:
    """Every locality probe, as kind "locality_train" or "locality_test". Raises `FormatError`, `MismatchError`."""
    for language, probes in _read_locality(kind, locality).items():
        if groups is not None and len(groups) != len(probes):
            raise FormatError(
                f"{kind}, {language!r}: {len(groups)} groups for {len(probes)} probes; give one name a position"
            )
        for position, probe in enumerate(probes):
            gold = (
                -1
                if probe.target is None
                else subject.gold(probe.target, probe, language, f"{kind}, {language!r}, probe {position}")
            )
            cluster = groups[position] if groups is not None else f"{kind}:{position}"
            yield Question(kind, language, f"{kind}:{position}", cluster, True, gold, probe)


def _read_locality(kind: str, locality: Locality | str | Path | None) -> dict[str, list[Probe]]:
    if locality is None:
        return {}
    if isinstance(locality, Mapping):
        return {
            language: [as_probe(item, f"{kind}, {language!r}, probe {position}") for position, item in enumerate(items)]
            for language, items in locality.items()
        }
    return read_probes(locality, f"{kind} file")


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 over everything that is asked."""
    rows = [[q.kind, q.language, q.id, q.cluster, q.gold, q.probe.text, q.probe.text_pair] for q in questions]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
