"""`explain`: which edits fired on one text, and what each of them moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xpatch.errors import FormatError
from xpatch.patches.jsonl import shorten
from xpatch.patches.requests import Probe
from xpatch.runtime.columns import columns
from xpatch.watch.answers import Answer, Reader
from xpatch.watch.observe import Firing, Question, Watched
from xpatch.watch.texts import Text
from xpatch.watch.units import listed

SHOWN_LABELS = 5


@dataclass(frozen=True)
class FiredEdit:
    """One edit that fired (or several that cannot be separated), and what switching it off alone changes.

    score: the largest `x·key + bias` of its neurons; None for deltas, which have no keys. token, position: where that was; None
    where the site does not see the text's tokens. without: the likeliest answers with this edit switched off and every other in
    place. moved: logit with the edit minus logit without it: every label of a classifier of few, else those it moves most. changes:
    whether the likeliest answer is another one without this edit.
    """

    set_name: str
    edits: tuple[str, ...]
    parts: tuple[str, ...]
    score: float | None
    position: int | None
    token: str | None
    without: tuple[Answer, ...]
    moved: tuple[tuple[str, float], ...]
    changes: bool


@dataclass(frozen=True)
class Explanation:
    """What the edits did to the answer on one text.

    base: the likeliest answers with every patch off; answers: as served. fired: the edits that fired at tokens that can reach the
    answer, strongest first. left_out: how many more fired than were asked about.
    """

    text: str
    text_pair: str | None
    language: str | None
    base: tuple[Answer, ...]
    answers: tuple[Answer, ...]
    fired: tuple[FiredEdit, ...]
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "text": self.text,
            "text_pair": self.text_pair,
            "language": self.language,
            "base": _plain(self.base),
            "answers": _plain(self.answers),
            "fired": [
                {
                    "set": edit.set_name,
                    "edits": list(edit.edits),
                    "parts": list(edit.parts),
                    "score": edit.score,
                    "position": edit.position,
                    "token": edit.token,
                    "without": _plain(edit.without),
                    "moved": dict(edit.moved),
                    "changes": edit.changes,
                }
                for edit in self.fired
            ],
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        pair = "" if self.text_pair is None else f" | {self.text_pair}"
        lines = [
            f"text      {self.text}{pair}" + (f"  ({self.language})" if self.language else ""),
            f"base      {', '.join(map(str, self.base))}",
            f"patched   {', '.join(map(str, self.answers))}",
        ]
        if not self.fired:
            return "\n".join([*lines, "no edit fired"])
        rows = [
            (
                edit.set_name,
                listed(edit.edits),
                None if edit.score is None else f"{edit.score:.3f}",
                None if edit.position is None else f"{edit.token} ({edit.position})",
                f"{edit.without[0]}{' !' if edit.changes else ''}",
                ", ".join(f"{label} {value:+.3f}" for label, value in edit.moved),
            )
            for edit in self.fired
        ]
        lines.append(columns(("set", "edit", "score", "at token", "without it", "moved"), rows))
        if self.left_out:
            lines.append(f"{self.left_out} more edits fired; raise limit= to see them")
        return "\n".join(lines)


def explain(
    model: Any,
    text: str,
    *,
    tokenizer: Any,
    text_pair: str | None = None,
    language: str | None = None,
    limit: int = 16,
    top: int = 2,
    batch_size: int = 16,
) -> Explanation:
    """Which edits fired on `text`, where, and what each moved in the logits. The model is left as it is, and may serve meanwhile.

    What an edit moved is found by leaving it out: the same text once more with that edit alone switched off, all others in
    place (rows of one batch). Where two edits do the same thing, each alone moves little; where they work against each other, both
    show it. Edits that cannot be separated are switched off together.

    tokenizer: the model's. language: as in `Rows`, for language masks. limit: so many edits are left out in turn, strongest
    first, `batch_size` at a time. top: so many answers are named. Works for sequence classifiers and for language models: those answer at the first mask
    token of the text, or after its last token (an encoder-decoder with its first token).

    Raises `FormatError` (an empty text, no tokenizer), `MismatchError` (a model without logits).
    """
    if limit < 0 or top < 1:
        raise FormatError(f"explain: expected limit >= 0 and top >= 1, found limit={limit}, top={top}")
    if not isinstance(text, str) or not text.strip():
        raise FormatError(f"explain: expected a text, found {shorten(repr(text))}")
    watched = Watched(model, tokenizer)
    asked = Text(Probe(text=text, text_pair=text_pair), language)
    (first,) = watched.ask([Question(asked)], with_scores=True)
    chosen = first.fired[:limit]
    questions = [Question(asked), Question(asked, base=True), *(Question(asked, firing.unit) for firing in chosen)]
    seen = sorted(watched.ask(questions, batch_size=batch_size), key=lambda one: one.number)
    served, base, *without = (one.logits for one in seen)
    edits = tuple(
        _edit(watched, firing, first.tokens, served, logits, top)
        for firing, logits in zip(chosen, without, strict=True)
    )
    read = watched.reader
    return Explanation(
        text=text,
        text_pair=text_pair,
        language=language,
        base=read.top(base, top),
        answers=read.top(served, top),
        fired=edits,
        left_out=len(first.fired) - len(chosen),
    )


def _edit(
    watched: Watched, firing: Firing, tokens: Sequence[int], served: torch.Tensor, without: torch.Tensor, top: int
) -> FiredEdit:
    unit, read = firing.unit, watched.reader
    token = None if firing.token is None else str(watched.tokenizer.convert_ids_to_tokens(tokens[firing.token]))
    return FiredEdit(
        set_name=unit.set_name,
        edits=unit.edits,
        parts=tuple(unit.rows),
        score=firing.score,
        position=firing.token,
        token=token,
        without=read.top(without, top),
        moved=_moved(read, served - without, SHOWN_LABELS),
        changes=bool(served.argmax() != without.argmax()),
    )


def _moved(read: Reader, moved: torch.Tensor, count: int) -> tuple[tuple[str, float], ...]:
    strongest = moved.abs().topk(min(count, len(moved))).indices
    return tuple((read.name(int(index)), float(moved[index])) for index in strongest)


def _plain(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [{"label": answer.label, "probability": answer.probability} for answer in answers]
