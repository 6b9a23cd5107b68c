"""Asks a private twin of a model, sees which edits fire at tokens that matter, and switches single edits off for single rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xpatch import api
from xpatch.errors import FormatError
from xpatch.evaluation.predict import batches
from xpatch.models.wrappers import unwrapped
from xpatch.patches.expiry import without_expired
from xpatch.patches.identity import check_fit
from xpatch.patches.types import LowRankDelta, PatchNeurons, PatchSet
from xpatch.runtime.attach import Runtime, runtime_of
from xpatch.runtime.calls import Call
from xpatch.runtime.firings import Firings, countable
from xpatch.runtime.layer import add_patches, scores
from xpatch.runtime.routing import Route
from xpatch.runtime.routing import rows as choosing
from xpatch.runtime.snapshot import AppliedSet, PreparedPart, Snapshot, prepare_set
from xpatch.watch.answers import Reader
from xpatch.watch.texts import Text
from xpatch.watch.twin import twin_of
from xpatch.watch.units import WHOLE, Unit, units_of

NOBODY = -1  # the owner of a row that is not there
Report = Callable[[str, int, int], None]
"""`report(stage, done, total)`: questions asked so far."""


@dataclass(frozen=True)
class Question:
    """A text, asked with every edit in place (`without` is None), without one unit, or without any (`base`)."""

    text: Text
    without: Unit | None = None
    base: bool = False


@dataclass(frozen=True)
class Firing:
    """One unit that fired. score: the largest `x·key + bias` of its neurons, None for deltas and where no scores were asked for.
    token: where that was; None where the site does not see the text's tokens."""

    unit: Unit
    score: float | None = None
    token: int | None = None


@dataclass(frozen=True)
class Seen:
    """What was seen for one question: its number, the answer's logits `[C]`, the tokens, and what fired (strongest first)."""

    number: int
    logits: torch.Tensor
    tokens: tuple[int, ...]
    fired: tuple[Firing, ...]


def served_by(model: Any) -> dict[str, AppliedSet]:
    """The sets applied to `model`, by name."""
    runtime = runtime_of(model)
    return {} if runtime is None else dict(runtime.snapshot.sets)


def as_applied(
    patches: PatchSet | str | Path, name: str | None, model: Any, tokenizer: Any, allow: Iterable[str] = ()
) -> tuple[str, PatchSet]:
    """What `apply(model, patches, name)` would put on: its name, and the set (or the folder's) without expired edits, checked.

    Raises `FormatError` for what is no set, `MismatchError` for one made for another base.
    """
    found = api.load(patches) if isinstance(patches, (str, Path)) else patches
    if not isinstance(found, PatchSet):
        raise FormatError(f"expected a PatchSet or the path of a patch folder, found {type(found).__name__}")
    if found.base is not None:
        served = [applied.patches for applied in served_by(model).values()]
        check_fit(found, unwrapped(model), tokenizer=tokenizer, allow=tuple(allow), served=served)
    return name or found.name or found.fingerprint[:12], without_expired(found)[0]


class Watched:
    """A twin of `model` with the sets it serves now, and `more` (name -> set) beside them or in their place.

    The model itself is never touched. Raises `MismatchError` for sets that have no place in it.
    """

    def __init__(self, model: Any, tokenizer: Any, more: Mapping[str, PatchSet] | None = None) -> None:
        if tokenizer is None:
            raise FormatError("tokenizer: expected the model's tokenizer, found None; pass tokenizer=...")
        applied = served_by(model)
        self.tokenizer = tokenizer
        self.model = twin_of(model)
        self.reader = Reader(self.model, tokenizer)
        self.runtime = _Varied(self.model)
        for name, patches in (more or {}).items():
            applied[name] = prepare_set(self.model, patches, name, lambda: self.runtime.sites)
        self.runtime.publish(Snapshot.of(applied, 1))
        self.units = [unit for name, made in applied.items() for unit in units_of(name, made.patches)]
        self._index = {id(unit): number for number, unit in enumerate(self.units)}
        self._parts = {part: self._owners(part) for made in applied.values() for part in made.parts}

    def ask(
        self,
        questions: Sequence[Question],
        *,
        batch_size: int = 64,
        with_scores: bool = False,
        stage: str = "asking",
        progress: Report | None = None,
    ) -> Iterator[Seen]:
        """What is seen for each question, longest texts first. `fired` is only looked for with every edit in place.

        An edit fired where one of its neurons did (or the gate of its delta was open; a delta without a gate always acts) at a token
        that can reach the answer: at the final FFN only the one the answer is read from, before it every token but padding.
        """
        done = 0
        probes = [question.text.probe for question in questions]
        for numbers, inputs in batches(self.model, self.tokenizer, probes, batch_size=batch_size):
            asked = [questions[number] for number in numbers]
            languages = [question.text.language for question in asked]
            inputs = self.reader.complete(inputs)
            self.runtime.begin(asked, with_scores)
            named = languages if any(languages) else None
            with torch.no_grad(), choosing(languages=named):
                output = self.model(**inputs)
            logits, read = self.reader.read(output, inputs)
            fired = self._fired(inputs, read)
            ids, tokens = inputs["input_ids"].cpu(), self.reader.tokens(inputs).cpu()
            for row, number in enumerate(numbers):
                seen = fired.get(row, ())
                yield Seen(int(number), logits[row].cpu(), tuple(ids[row][: _length(tokens[row])].tolist()), seen)
            done += len(numbers)
            if progress is not None:
                progress(stage, done, len(questions))

    def _owners(self, part: PreparedPart) -> np.ndarray:
        """The number of the unit that owns each row `[N]`; `[1]` for a delta, whose rows fire together."""
        mine = [
            (unit, unit.rows[part.name])
            for unit in self.units
            if unit.set_name == part.set_name and part.name in unit.rows
        ]
        table = np.full(max(part.part.count, 1), NOBODY)
        for unit, rows in mine:
            table[slice(None) if rows is WHOLE else list(rows)] = self._index[id(unit)]
        return table

    def _fired(self, inputs: Mapping[str, torch.Tensor], read: torch.Tensor | None) -> dict[int, tuple[Firing, ...]]:
        """Batch row -> what fired in it."""
        found: dict[int, dict[int, Firing]] = {row: {} for row in self.runtime.complete_rows}
        for part, heard in self.runtime.heard.items():
            owner = self._parts[part]
            matters = self._matters(part, inputs, None if heard.again else read, heard.fired.shape[1])[heard.rows]
            acting = heard.fired & matters.unsqueeze(-1).to(heard.fired.device)  # [B, T, N]
            at = None if heard.scores is None else heard.scores.masked_fill(~acting, -torch.inf).max(1)
            for item, neuron in acting.any(1).nonzero().tolist():
                units = {int(owner[neuron])} if isinstance(part.part, PatchNeurons) else set(owner.tolist())
                score = None if at is None else float(at.values[item, neuron])
                where = acting[item, :, neuron].nonzero()[0, 0] if at is None else at.indices[item, neuron]
                token = int(where) if acting.shape[1] == inputs["input_ids"].shape[1] else None
                mine = found[heard.rows[item]]
                for number in units - {NOBODY}:
                    before = mine.get(number)
                    if before is None or (score is not None and (before.score is None or score > before.score)):
                        mine[number] = Firing(self.units[number], score, token)
        always = {unit for part, owner in self._parts.items() if not countable(part) for unit in owner.tolist()}
        for mine in found.values():
            for number in always - {NOBODY}:
                mine.setdefault(number, Firing(self.units[number]))
        return {row: tuple(sorted(mine.values(), key=_strength)) for row, mine in found.items()}

    def _matters(
        self, part: PreparedPart, inputs: Mapping[str, torch.Tensor], read: torch.Tensor | None, length: int
    ) -> torch.Tensor:
        """`[B, length]` bool: the tokens of a site that can reach the answer."""
        tokens = self.reader.tokens(inputs)
        if length != tokens.shape[1]:
            return torch.ones(tokens.shape[0], length, dtype=torch.bool, device=tokens.device)
        if read is not None and part.point.site in self.reader.final:
            return torch.arange(length, device=tokens.device) == read.to(tokens.device).unsqueeze(-1)
        return tokens


@dataclass
class _Heard:
    """Of one part: for batch `rows`, what fired `[len(rows), T, N]` and the scores of its neurons, where asked for.

    again: the site was computed more than once in the call, as where layers share their weights.
    """

    rows: list[int]
    fired: torch.Tensor
    scores: torch.Tensor | None = None
    again: bool = False


class _Ear(Firings):
    """Keeps what the layer says fired, instead of counting it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[PreparedPart, torch.Tensor] = {}

    def record(self, part: PreparedPart, fired: torch.Tensor, lead: Sequence[int], neurons: int, route: Route) -> None:
        table = torch.zeros(math.prod(lead), neurons, dtype=torch.bool, device=fired.device)
        table[fired[:, 0], fired[:, 1]] = True
        self.said[part] = table.reshape(*lead, neurons)


class _Varied(Runtime):
    """A runtime whose rows can each lack one unit, or everything."""

    def begin(self, questions: Sequence[Question], with_scores: bool) -> None:
        """Set what the next call's rows lack, and forget what was heard before."""
        variants: dict[tuple[int, bool], list[int]] = {}
        for row, question in enumerate(questions):
            variants.setdefault((id(question.without), question.base), []).append(row)
        self.variants = [(questions[rows[0]], rows) for rows in variants.values()]
        self.complete_rows = [
            row for row, question in enumerate(questions) if question.without is None and not question.base
        ]
        self.with_scores = with_scores
        self.heard: dict[PreparedPart, _Heard] = {}
        self._cut: dict[tuple[int, PreparedPart], PreparedPart | None] = {}
        self._batch = len(questions)

    def add(self, site: str, x: torch.Tensor, y: torch.Tensor, call: Call) -> torch.Tensor | None:
        """As the runtime's, each variant's rows with its own patches."""
        parts = call.snapshot.at.get(site)
        if parts is None:
            return None
        out = y.clone()
        for question, rows in self.variants:
            if question.base:
                continue
            here = torch.tensor(rows, device=y.device)
            each = y.shape[0] // self._batch  # more than 1 where a model flattens its tokens
            if each > 1:
                here = (here.unsqueeze(1) * each + torch.arange(each, device=y.device)).flatten()
            route = _part_of(call.route, rows)
            mine = [part if question.without is None else self._without(part, question.without) for part in parts]
            ear = _Ear()
            entering = x[here.to(x.device)]
            out[here] = add_patches(tuple(part for part in mine if part is not None), entering, y[here], route, ear)
            if question.without is None:
                self._hear(ear, rows, entering.to(y.device), route)
        return out

    def _hear(self, ear: _Ear, rows: list[int], x: torch.Tensor, route: Route) -> None:
        for part, fired in ear.said.items():
            fired = fired.reshape(len(rows), -1, fired.shape[-1])
            neurons = self.with_scores and isinstance(part.part, PatchNeurons)
            made = scores(part, x, route).reshape(fired.shape) if neurons else None
            before = self.heard.get(part)
            if before is not None:
                fired = fired | before.fired
                made = None if made is None or before.scores is None else torch.maximum(made, before.scores)
            self.heard[part] = _Heard(rows, fired, made, again=before is not None)

    def _without(self, part: PreparedPart, unit: Unit) -> PreparedPart | None:
        """The part with the unit's rows silenced: neurons without a value, ranks without an output; None without the whole part."""
        if part.set_name != unit.set_name or part.name not in unit.rows:
            return part
        key = (id(unit), part)
        if key not in self._cut:
            rows = unit.rows[part.name]
            self._cut[key] = None if rows is WHOLE else _silenced(part, rows)
        return self._cut[key]


def _silenced(part: PreparedPart, rows: tuple[int, ...]) -> PreparedPart:
    silent = torch.tensor(rows)
    if isinstance(part.part, LowRankDelta):
        up = part.part.up.index_fill(1, silent.to(part.part.up.device), 0)
        return replace(part, tensors=part.tensors.replaced(up=up))
    values = part.part.values.index_fill(0, silent.to(part.part.values.device), 0)  # type: ignore[union-attr]
    return replace(part, tensors=part.tensors.replaced(values=values))


def _part_of(route: Route, rows: list[int]) -> Route:
    languages = route.languages
    if isinstance(languages, tuple):
        languages = tuple(languages[row] for row in rows)
    return Route(languages=languages, keep=None, batch=len(rows))


def _length(tokens: torch.Tensor) -> int:
    """Up to the last token that is not padding."""
    return int(tokens.nonzero().max()) + 1 if tokens.any() else 0


def _strength(firing: Firing) -> float:
    return -firing.score if firing.score is not None else float("inf")
