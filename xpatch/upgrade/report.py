"""What holds after an upgrade: every edit by language, a summary, a table, JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from xpatch.evaluation.metrics import Answers, Predictions

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["already-right", "holds", "lost", "failed", "rejected", "redacted", "expired"]
NOT_HELD = ("lost", "failed")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LanguageReport(_Frozen):
    """How many texts are right, of one edit in one language or of all. texts: the edits' own wordings; rephrases: theirs.

    before: on the new base without patches; after: with the new set; old: on the old base with the old set, None where there was no
    old base to ask. lost: texts and rephrases that were right on the old base, or on the new one without patches, and are wrong now.
    """

    texts: int = 0
    before: int = 0
    after: int = 0
    old: int | None = None
    rephrases: int = 0
    rephrases_before: int = 0
    rephrases_after: int = 0
    rephrases_old: int | None = None
    lost: int = 0


class EditReport(_Frozen):
    """One edit of the old ledger.

    status: "already-right": right on the new base, it needs no patch any more; "holds": trained again and right, nothing lost;
    "lost": a text that was right before is wrong now; "failed": still wrong in a language its method trains, or rejected
    now; "rejected" (it was never tried), "redacted", "expired": not trained. languages: empty for the last three.
    """

    id: str
    status: Status
    method: str
    message: str
    languages: dict[str, LanguageReport] = {}


class UpgradeReport(_Frozen):
    """An upgrade. patches, retrained: fingerprints of the old and the new set; compared: whether the old base was asked too."""

    model: str
    patches: str
    retrained: str
    compared: bool
    edits: tuple[EditReport, ...]
    languages: dict[str, LanguageReport]

    @property
    def holds(self) -> bool:
        """Whether every edit that was trained again, or needed not to be, is right and lost nothing."""
        return not any(edit.status in NOT_HELD for edit in self.edits)

    def having(self, *status: Status) -> tuple[EditReport, ...]:
        """The edits of these statuses."""
        return tuple(edit for edit in self.edits if edit.status in status)

    def table(self) -> Table:
        """A rich table: one line a language; texts and rephrases right on each base, and how many were lost."""
        from rich.table import Table

        old = [("old set", "old")] if self.compared else []
        columns = [("texts", "texts"), *old, ("new base", "before"), ("new set", "after")]
        rephrased = any(found.rephrases for found in self.languages.values())
        shown = Table(title=f"{len(self.edits)} edits, right texts", caption=self._caption(), title_justify="left")
        shown.add_column("language")
        for heading, _ in columns:
            shown.add_column(heading, justify="right")
        for heading, _ in columns if rephrased else ():
            shown.add_column("rephrases" if heading == "texts" else heading, justify="right")
        shown.add_column("lost", justify="right")
        for language, found in self.languages.items():
            cells = [getattr(found, name) for _, name in columns]
            if rephrased:
                cells += [
                    getattr(found, "rephrases" if name == "texts" else f"rephrases_{name}") for _, name in columns
                ]
            shown.add_row(language, *("" if cell is None else str(cell) for cell in (*cells, found.lost)))
        return shown

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON; also written to `path` (whole or not at all)."""
        text = self.model_dump_json(indent=2)
        if path is not None:
            target = Path(path)
            temporary = target.with_name(target.name + ".tmp")
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(target)
        return text

    def _caption(self) -> str:
        before = (
            "on the old base, or on the new one without patches" if self.compared else "on the new base without patches"
        )
        return f"lost: texts and rephrases right {before}, and wrong with the new set"


def languages_of(
    new: Predictions, old: Predictions | None, ids: Mapping[str, object]
) -> dict[str, dict[str, LanguageReport]]:
    """Edit id -> language -> its figures, from the predictions of two evaluations of the same requests."""
    counts: dict[str, dict[str, dict[str, int]]] = {id: {} for id in ids}
    for kind, prefix in (("edit", ""), ("rephrase", "rephrases_")):
        for language, answers in new.get(kind, {}).items():
            earlier = old[kind][language] if old is not None else None
            for row, id in enumerate(answers.id):
                found = counts[id].setdefault(language, dict.fromkeys(LanguageReport.model_fields, 0))
                _count(found, prefix, answers, earlier, row)
    drop = () if old is not None else ("old", "rephrases_old")
    return {
        id: {code: LanguageReport(**{k: v for k, v in found.items() if k not in drop}) for code, found in by.items()}
        for id, by in counts.items()
    }


def _count(found: dict[str, int], prefix: str, answers: Answers, earlier: Answers | None, row: int) -> None:
    gold = answers.gold[row]
    before, after = answers.before[row] == gold, answers.after[row] == gold
    held = earlier is not None and earlier.after[row] == earlier.gold[row]
    found["rephrases" if prefix else "texts"] += 1
    found[f"{prefix}before"] += before
    found[f"{prefix}after"] += after
    found[f"{prefix}old"] += held
    found["lost"] += (before or held) and not after


def summed(edits: tuple[EditReport, ...]) -> dict[str, LanguageReport]:
    """Language -> the sum over all edits."""
    totals: dict[str, dict[str, int | None]] = {}
    for edit in edits:
        for language, found in edit.languages.items():
            total = totals.setdefault(language, {})
            for name, value in found:
                total[name] = None if value is None else (total.get(name) or 0) + value
    return {language: LanguageReport.model_validate(total) for language, total in totals.items()}
