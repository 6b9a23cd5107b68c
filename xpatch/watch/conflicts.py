"""`check`: edits that contradict each other, on paper (`contradictions`) and at work (`oppositions`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xpatch.patches.jsonl import shorten
from xpatch.patches.types import PatchSet
from xpatch.runtime.columns import columns
from xpatch.watch.contradictions import Contradiction, contradictions
from xpatch.watch.observe import Report, Watched, as_applied, served_by
from xpatch.watch.oppositions import NOTABLE, Opposition, oppositions
from xpatch.watch.texts import Texts, as_texts, texts_of
from xpatch.watch.units import listed

SHOWN = 40


@dataclass(frozen=True)
class ConflictReport:
    """What contradicts: true where something does, false where nothing was found (`ok`).

    texts: how many were asked. unread: (set, edit) whose request was redacted, so that its claims could not be compared.
    left_out: (text, edit) pairs that fired but were over the limit and not asked about.
    """

    contradictions: tuple[Contradiction, ...] = ()
    oppositions: tuple[Opposition, ...] = ()
    texts: int = 0
    unread: tuple[tuple[str, str], ...] = ()
    left_out: int = 0

    @property
    def ok(self) -> bool:
        return not self

    def __bool__(self) -> bool:
        return bool(self.contradictions or self.oppositions)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lines = []
        if self.contradictions:
            lines.append("edits of one claim with different targets")
            claims = [_claims(item) for item in self.contradictions[:SHOWN]]
            lines.append(columns(("text", "language", "edit", "target", "edit", "target"), claims))
        if self.oppositions:
            lines.append("edits that pull one answer apart")
            pulls = [_pulls(item) for item in self.oppositions[:SHOWN]]
            lines.append(columns(("text", "language", "answer", "edit", "raises", "edit", "raises", "cosine"), pulls))
        more = max(0, len(self.contradictions) - SHOWN) + max(0, len(self.oppositions) - SHOWN)
        lines += [f"{more} more; to_dict() holds all"] if more else []
        lines += [] if self else [f"no conflict found; {self.texts} texts asked"]
        lines += (
            [f"claims could not be compared, their requests are redacted: {len(self.unread)}"] if self.unread else []
        )
        lines += [f"{self.left_out} firings were not asked about; raise limit= to ask"] if self.left_out else []
        return "\n".join(lines)


def check(
    patches: PatchSet | str | Path,
    model: Any,
    tokenizer: Any,
    texts: Texts | None = None,
    *,
    name: str | None = None,
    allow: Iterable[str] = (),
    notable: float = NOTABLE,
    limit: int = 16,
    batch_size: int = 64,
    progress: Report | None = None,
) -> ConflictReport:
    """Conflicts within `patches`, and between it and the sets `model` serves. The model is left as it is and may serve meanwhile.

    Two kinds are looked for. Two edits of one claim with different targets (see `contradictions`). Two edits that fire on one text
    and pull its answer apart (see `oppositions`; `notable` is the least pull that counts, in log-odds). A set that
    `apply(model, patches, name)` would replace is left out, as are expired edits; conflicts among the sets served already are not
    reported.

    texts: asked for the second kind (see `as_texts`); by default every text of the requests of both sides: edited texts, rephrases
    and texts that must not change. limit: on one text at most so many firing edits are switched off in turn, those of `patches`
    first and the strongest of them first. allow: as for `apply`. progress: called as `progress(stage, done, total)`; stage "firing"
    counts texts, "effects" the texts asked again with an edit switched off.

    Raises `FormatError` (texts), `MismatchError` (a set made for another base).
    """
    slot, checked = as_applied(patches, name, model, tokenizer, allow)
    others = {key: applied.patches for key, applied in served_by(model).items() if key != slot}
    sets = {slot: checked, **others}
    records = [(key, record) for key, value in sets.items() for record in value.edits]
    known = texts_of(record.request for _, record in records if record.request is not None)
    asked = known if texts is None else as_texts(texts)
    watched = Watched(model, tokenizer, {slot: checked})
    found, left_out = oppositions(
        watched, asked, slot, notable=notable, limit=limit, batch_size=batch_size, progress=progress
    )
    return ConflictReport(
        contradictions=tuple(contradictions(sets, slot, watched.model)),
        oppositions=tuple(found),
        texts=len(asked),
        unread=tuple(
            (key, record.id) for key, record in records if record.request is None and record.status != "rejected"
        ),
        left_out=left_out,
    )


def _claims(item: Contradiction) -> tuple[object, ...]:
    sides = [(f"{side.set_name}/{side.edit}", side.target) for side in (item.first, item.second)]
    return (shorten(item.text, 60), item.language, *sides[0], *sides[1])


def _pulls(item: Opposition) -> tuple[object, ...]:
    sides = [
        (f"{side.set_name}/{listed(side.edits)}", f"{side.raises} {side.moved:+.2f}")
        for side in (item.first, item.second)
    ]
    return (shorten(item.text, 60), item.language, item.answer, *sides[0], *sides[1], f"{item.cosine:.2f}")
