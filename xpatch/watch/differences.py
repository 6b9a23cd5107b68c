"""`diff`: which predictions a patch set changes."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpatch.patches.jsonl import shorten
from xpatch.patches.types import PatchSet
from xpatch.runtime.columns import columns
from xpatch.runtime.firings import UNKNOWN
from xpatch.watch.answers import Answer
from xpatch.watch.observe import Question, Report, Watched, as_applied
from xpatch.watch.texts import Text, Texts, as_texts

SHOWN = 60
FIELDS = (
    "text", "text_pair", "language", "before", "after", "probability_before", "probability_after", "fired_before", "fired_after"
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One text: its likeliest answer before and after, each with its probability, and the edits that fired ("set/edit")."""

    text: str
    text_pair: str | None
    language: str | None
    before: str
    after: str
    probability_before: float
    probability_after: float
    fired_before: tuple[str, ...]
    fired_after: tuple[str, ...]

    @property
    def changed(self) -> bool:
        return self.before != self.after


@dataclass(frozen=True)
class Diff:
    """The answers to every text, before and after; `changes` are those that differ. Its length is the number of changes."""

    rows: tuple[Row, ...]

    @property
    def changes(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.changed)

    @property
    def by_language(self) -> dict[str, tuple[int, int]]:
        """language ("?" where none was given) -> (changed, asked)."""
        counts: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            changed, asked = counts.get(row.language or UNKNOWN, (0, 0))
            counts[row.language or UNKNOWN] = (changed + row.changed, asked + 1)
        return counts

    def __len__(self) -> int:
        return len(self.changes)

    def to_dict(self, *, all: bool = False) -> dict[str, Any]:
        """Plain data, for JSON: the changes, or with `all` every text."""
        return {
            "texts": len(self.rows),
            "changed": len(self),
            "by_language": {code: {"changed": c, "texts": n} for code, (c, n) in self.by_language.items()},
            "rows": [dataclasses.asdict(row) for row in (self.rows if all else self.changes)],
        }

    def to_csv(self, path: str | Path | None = None, *, all: bool = False) -> str:
        """The changes (with `all` every text) as CSV, also written to `path`, whole or not at all. Fired edits stand in one cell."""
        out = io.StringIO()
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows if all else self.changes:
            cells = dataclasses.asdict(row)
            writer.writerow({**cells, **{name: " ".join(cells[name]) for name in ("fired_before", "fired_after")}})
        if path is not None:
            target = Path(path)
            temporary = target.with_name(target.name + ".tmp")
            temporary.write_text(out.getvalue(), encoding="utf-8", newline="")
            temporary.replace(target)
        return out.getvalue()

    def __str__(self) -> str:
        lines = [f"{len(self)} of {len(self.rows)} predictions change"]
        if self.changes:
            rows = [
                (
                    shorten(row.text, 60),
                    row.language,
                    f"{row.before} {row.probability_before:.3f}",
                    f"{row.after} {row.probability_after:.3f}",
                    " ".join(row.fired_after) or None,
                )
                for row in self.changes[:SHOWN]
            ]
            lines.append(columns(("text", "language", "before", "after", "fired"), rows))
        if len(self) > SHOWN:
            lines.append(f"{len(self) - SHOWN} more; to_csv() holds all")
        return "\n".join(lines)


def diff(
    model: Any,
    tokenizer: Any,
    a: PatchSet | str | Path,
    b: PatchSet | str | Path | None = None,
    *,
    texts: Texts,
    name: str | None = None,
    allow: Iterable[str] = (),
    batch_size: int = 64,
    progress: Report | None = None,
) -> Diff:
    """Which answers to `texts` change when `a` is applied, or when `b` takes the place of `a`. The model is left as it is.

    a, b: patch sets, or folders to load. Without `b`: before is the model as it answers now (with the sets it serves), after is the
    same with `a` applied. With `b`: before is with `a`, after with `b` in its place. name: what `apply` would call the set (by
    default its own name); a set that is applied under that name is replaced, as `apply` does. allow: as for `apply`. texts: see `as_texts`; the answers
    are those of `explain`. progress: called as `progress(stage, done, total)`.

    Raises `FormatError` (texts, folders), `MismatchError` (a set made for another base).
    """
    asked = as_texts(texts)
    slot, first = as_applied(a, name, model, tokenizer, allow)
    second = None if b is None else as_applied(b, name, model, tokenizer, allow)[1]
    sides: list[dict[str, PatchSet]] = [{}, {slot: first}] if second is None else [{slot: first}, {slot: second}]
    answers = [
        _answers(Watched(model, tokenizer, more), asked, batch_size, stage, progress)
        for more, stage in zip(sides, ("before", "after"), strict=True)
    ]
    return Diff(tuple(_row(text, *found) for text, *found in zip(asked, *answers, strict=True)))


def _answers(
    watched: Watched, texts: Sequence[Text], batch_size: int, stage: str, progress: Report | None
) -> list[tuple[Answer, tuple[str, ...]]]:
    """The likeliest answer to each text and the edits that fired, in the order of the texts."""
    found: dict[int, tuple[Answer, tuple[str, ...]]] = {}
    for seen in watched.ask([Question(text) for text in texts], batch_size=batch_size, stage=stage, progress=progress):
        (best,) = watched.reader.top(seen.logits)
        found[seen.number] = best, tuple(firing.unit.label for firing in seen.fired)
    return [found[number] for number in range(len(texts))]


def _row(text: Text, before: tuple[Answer, tuple[str, ...]], after: tuple[Answer, tuple[str, ...]]) -> Row:
    return Row(
        text=text.probe.text,
        text_pair=text.probe.text_pair,
        language=text.language,
        before=before[0].label,
        after=after[0].label,
        probability_before=before[0].probability,
        probability_after=after[0].probability,
        fired_before=before[1],
        fired_after=after[1],
    )
