"""The result of an evaluation: metrics, every prediction behind them, a table, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from xpatch.errors import FormatError, MismatchError
from xpatch.evaluation.bootstrap import Estimate
from xpatch.evaluation.metrics import Answers, Metrics, measure

if TYPE_CHECKING:
    from rich.table import Table

ROWS = (
    ("edit texts right, unpatched", "before", None),
    ("edit texts right, all edits", "reliability+clg", "clg_avg"),
    ("edit texts right, needed edits", "clg_needed", "clg_needed_avg"),
    ("unseen paraphrases right, needed edits", "clg_unseen", "clg_unseen_avg"),
    ("unseen paraphrases right, all edits", "clg_unseen_all", "clg_unseen_all_avg"),
    ("portability", "portability", None),
    ("near texts unchanged", "near_unchanged", None),
    ("other subjects unchanged", "unchanged", "unchanged_avg"),
    ("other subjects right, training type", "locality_train_by_language", None),
    ("other subjects right, test type", "locality_test_by_language", None),
)


class Report(BaseModel):
    """One evaluation, immutable. Class indices in `predictions` refer to `labels`; -1 is "no gold label"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    labels: tuple[str, ...]
    edits: int
    needed: tuple[str, ...]
    languages: tuple[str, ...]
    patches: str | None
    seed: int
    probes: str
    metrics: Metrics
    predictions: dict[str, dict[str, Answers]]

    def table(self) -> Table:
        """A rich table: one line a measure, one column a language, each with its 95 % interval."""
        from rich.table import Table

        shown = Table(
            title=f"{self.edits} edits, {len(self.needed)} needed",
            caption="% with 95 % bootstrap intervals; the mean of 'all edits' is CLG, over the languages the edits were not written in",
        )
        shown.add_column("")
        for language in (*self.languages, "mean"):
            shown.add_column(language, justify="right")
        for title, field, mean in ROWS:
            values = self._row(field)
            if values:
                cells = [_cell(values.get(language)) for language in self.languages]
                shown.add_row(title, *cells, _cell(getattr(self.metrics, mean) if mean else None))
        if self.metrics.mlg is not None:
            shown.caption = (
                f"{shown.caption}\nMLG (rephrases in the edit's own language, all edits): {self.metrics.mlg}"
            )
        return shown

    def _row(self, field: str) -> Mapping[str, Estimate]:
        if field != "reliability+clg":
            found: Mapping[str, Estimate] = getattr(self.metrics, field)
            return found
        own = {
            answers_language
            for answers_language, answers in self.predictions.get("edit", {}).items()
            if any(answers.own)
        }
        values = dict(self.metrics.clg)
        if self.metrics.reliability is not None and len(own) == 1:
            values[next(iter(own))] = self.metrics.reliability
        return values

    def to_json(self, path: str | Path | None = None, *, predictions: bool = True) -> str:
        """The report as JSON, without the per-case predictions on wish; also written to `path` (whole or not at all)."""
        text = self.model_dump_json(exclude=None if predictions else {"predictions"}, indent=None if predictions else 2)
        if path is not None:
            target = Path(path)
            temporary = target.with_name(target.name + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read a report written with its predictions. Raises `FormatError`."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise FormatError(f"{path} is no readable evaluation report: {error}") from None


def pool(reports: Sequence[Report], *, language: str = "en", seed: int = 0) -> Metrics:
    """The metrics of several reports on the same cases (seeds) as one: shares over all texts, clusters resampled together.

    Raises `MismatchError` for reports on different texts.
    """
    if not reports or any(report.probes != reports[0].probes for report in reports):
        raise MismatchError("only reports on the same cases and locality texts can be pooled; expected at least one")
    return measure([(report.predictions, set(report.needed)) for report in reports], language=language, seed=seed)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f}\n[dim]{100 * estimate.low:.0f}–{100 * estimate.high:.0f}[/dim]"
