"""Training batches: which edit, in which language, to hold in which other language, and which texts must stay.

Draws depend on the seed and the step alone, so a resumed training draws what an uninterrupted one would, and so do several
processes, each of which takes its share of a step's edits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xpatch.editors.hyper.config import Languages, TrainConfig
from xpatch.errors import FormatError, MismatchError
from xpatch.patches.requests import EditRequest, Probe


@dataclass(frozen=True)
class Example:
    """One request as training material. texts: language -> canonical wording and its rephrases; labels: language -> the request's
    target, None where it names none; locality: language -> its own probes."""

    id: str
    language: str
    texts: Mapping[str, tuple[Probe, ...]]
    labels: Mapping[str, int | None]
    locality: Mapping[str, tuple[Probe, ...]]


@dataclass(frozen=True)
class Draw:
    """One edit of a step. label: the target asked for, None where it follows from the base's answer: that answer where `flip` is
    None, else another label, chosen by `flip` in [0, 1)."""

    id: str
    inner: Probe
    language: str
    outer: Probe
    outer_language: str
    locality: tuple[Probe, ...]
    label: int | None
    flip: float | None


def as_examples(requests: Sequence[EditRequest], labels: Mapping[str, int]) -> list[Example]:
    """Requests with label indices. Raises `MismatchError` for a target the model has no label for."""
    found = []
    for request in requests:
        targets: dict[str, int | None] = {}
        for language in request.versions:
            target = request.target_of(language)
            if target is not None and target not in labels:
                names = ", ".join(name for name in labels if not name.isdigit()) or ", ".join(labels)
                raise MismatchError(
                    f"request {request.id!r}, language {language!r}: the model has no label {target!r}; labels: {names}"
                )
            targets[language] = None if target is None else labels[target]
        found.append(
            Example(
                request.id,
                request.language,
                {language: (version.probe, *version.rephrases) for language, version in request.versions.items()},
                targets,
                {language: version.locality for language, version in request.versions.items()},
            )
        )
    return found


class Sampler:
    """Draws of examples.

    locality: language -> further texts to keep. The texts of other examples count among those to keep.
    Raises `FormatError` where there is nothing to draw from.
    """

    def __init__(
        self, examples: Sequence[Example], locality: Mapping[str, Sequence[Probe]], config: TrainConfig, seed: int
    ) -> None:
        self._examples, self._config, self._seed = list(examples), config, seed
        self._pool = [
            (number, language)
            for number, example in enumerate(self._examples)
            for language in _among(config.edit_languages, example.language, example.texts)
        ]
        self._keep: dict[str, list[tuple[int, Probe]]] = {}
        for number, example in enumerate(self._examples):
            for language, texts in example.texts.items():
                self._keep.setdefault(language, []).extend((number, probe) for probe in texts)
        for language, probes in locality.items():
            self._keep.setdefault(language, []).extend((-1, probe) for probe in probes)
        if not self._pool:
            raise FormatError(
                f"no request has a version in the edit languages {config.edit_languages!r}; give requests that do, or other languages"
            )
        if config.flips is None and any(self._examples[n].labels[lang] is None for n, lang in self._pool):
            raise FormatError("flips=None trains on the requests' own targets, and a request has none; name its target")
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages edits are drawn in, sorted."""
        return tuple(sorted({language for _, language in self._pool}))

    def __len__(self) -> int:
        """Edits in one pass over the data."""
        return len(self._pool)

    def draw(self, index: int) -> Draw:
        """Edit number `index` of the training: a walk through a permutation of the data, a new one for each pass."""
        turn, place = divmod(index, len(self._pool))
        if self._order[0] != turn:
            order = list(range(len(self._pool)))
            random.Random(f"{self._seed}:order:{turn}").shuffle(order)
            self._order = (turn, order)
        number, language = self._pool[self._order[1][place]]
        return self._draw(number, language, random.Random(f"{self._seed}:draw:{index}"))

    def _draw(self, number: int, language: str, rng: random.Random) -> Draw:
        example, config = self._examples[number], self._config
        outer_language = rng.choice(sorted(_among(config.outer_languages, language, example.texts)) or [language])
        texts = example.texts[outer_language]
        if config.outer_texts == "edit" or (config.outer_texts == "rephrase" and outer_language != language):
            outer = texts[0]
        elif config.outer_texts == "rephrase":
            outer = rng.choice(texts[1:] or texts)
        else:
            outer = rng.choice(texts)
        flip, label = None, example.labels[language]
        if config.flips is not None:
            label = None
            flip = rng.random() if rng.random() < config.flips else None
        locality = tuple(self._other(number, language, turn, rng) for turn in range(config.locality_per_edit))
        return Draw(example.id, example.texts[language][0], language, outer, outer_language, locality, label, flip)

    def _other(self, number: int, language: str, turn: int, rng: random.Random) -> Probe:
        """A text to keep: the example's own probe first, then any text of another example in an outer language."""
        wanted = rng.choice(sorted(_among(self._config.outer_languages, language, self._keep)) or [language])
        own = self._examples[number].locality.get(wanted, ())
        if own and turn == 0:
            return rng.choice(own)
        pool = self._keep[wanted]
        for _ in range(50):
            owner, probe = rng.choice(pool)
            if owner != number:
                return probe
        raise FormatError(
            "training needs texts that must stay as they are: give more than one request, locality probes, or `locality` texts"
        )


def _among(wanted: Languages, own: str, there: Mapping[str, object]) -> list[str]:
    """The languages wanted, of those there are, in the order of the data (never of a set)."""
    if wanted == "own":
        return [own] if own in there else []
    return [language for language in there if wanted == "all" or language in wanted]
