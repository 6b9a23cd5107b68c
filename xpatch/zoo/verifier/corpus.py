"""Masked and translation LM batches from the facts: whole subjects and objects are masked, replaced or kept.

A fact's sentence exists in every language and template; a translation pair puts two of them in one input (positions start anew in
the second, segment ids 0 and 1). Some single sentences name their subject or object in another language, which ties the names of
one entity together. Replaced objects are other objects of the same relation, so the model must trust what it knows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from xpatch.zoo.verifier.data import TEMPLATES, Fact, facts, sentence
from xpatch.zoo.verifier.facts import LANGUAGES

CLS, SEP, MASK, FIRST_WORD = 2, 3, 4, 5
MONO_WEIGHTS = {"en": 1.0, "de": 0.8, "fr": 0.8, "es": 0.8, "zh": 1.6, "ar": 1.6}
PAIR_WEIGHTS = {
    ("en", "zh"): 3.0,
    ("en", "ar"): 3.0,
    ("zh", "ar"): 1.0,
    ("en", "de"): 1.0,
    ("en", "fr"): 1.0,
    ("en", "es"): 1.0,
}
OTHER_PAIR = 0.4
SWITCHED = 0.3  # share of single sentences whose subject (and, independently, object) is named in another language
CAPACITY = {1: 0.15, 2: 0.19}  # predicted positions as a share of all, by sentences per input

Masked = tuple[list[int], list[int]]  # input ids, labels


@dataclass(frozen=True)
class Sentence:
    """Token ids without special tokens, and the spans [start, stop) of subject and object."""

    ids: tuple[int, ...]
    subject: tuple[int, int]
    object: tuple[int, int]


class Corpus:
    """All sentences of all facts, and random batches from them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = random.Random(seed)
        self.facts = facts()
        self.vocabulary = len(tokenizer)
        self.sentences: dict[tuple[int, str, int], Sentence] = {}
        self.rivals: dict[tuple[str, str, int, int], list[tuple[str, tuple[int, ...]]]] = {}
        for index, fact in enumerate(self.facts):
            for language in LANGUAGES:
                for template in range(TEMPLATES):
                    made = _encode(tokenizer, fact, language, template)
                    self.sentences[index, language, template] = made
                    span = made.ids[slice(*made.object)]
                    self.rivals.setdefault((fact.relation, language, template, len(span)), []).append(
                        (fact.object, span)
                    )
        pairs = [(a, b) for i, a in enumerate(LANGUAGES) for b in LANGUAGES[i + 1 :]]
        self.pairs = pairs, [PAIR_WEIGHTS.get(pair, OTHER_PAIR) for pair in pairs]

    def mono(self, size: int, length: int) -> dict[str, torch.Tensor]:
        """`size` masked sentences, each in one language, padded to `length`."""
        languages = self.rng.choices(list(MONO_WEIGHTS), list(MONO_WEIGHTS.values()), k=size * 2)
        rows: list[list[Masked]] = []
        while len(rows) < size:
            key = (self.rng.randrange(len(self.facts)), languages[len(rows)], self.rng.randrange(TEMPLATES))
            made, object_language = self._switched(key)
            if len(made.ids) + 2 <= length:
                rows.append([self._masked(made, (key[0], object_language, key[2]), object_=0.9, subject=0.06)])
            else:
                languages[len(rows)] = self.rng.choice(LANGUAGES)
        return self._batch(rows, length)

    def pair(self, size: int, length: int) -> dict[str, torch.Tensor]:
        """`size` translation pairs (two languages, two templates of one fact), padded to `length`."""
        rows: list[list[Masked]] = []
        while len(rows) < size:
            index = self.rng.randrange(len(self.facts))
            first, second = self.rng.choices(*self.pairs)[0]
            if self.rng.random() < 0.5:
                first, second = second, first
            keys = [(index, language, self.rng.randrange(TEMPLATES)) for language in (first, second)]
            if sum(len(self.sentences[key].ids) for key in keys) + 3 > length:
                continue
            both = self.rng.random() < 0.35
            side = self.rng.random() < 0.5
            subject = self.rng.random()
            rows.append(
                [
                    self._masked(
                        self.sentences[keys[0]], keys[0], 1.0 if both or side else 0.0, 1.0 if subject < 0.2 else 0.0
                    ),
                    self._masked(
                        self.sentences[keys[1]],
                        keys[1],
                        1.0 if both or not side else 0.0,
                        1.0 if subject > 0.8 else 0.0,
                    ),
                ]
            )
        return self._batch(rows, length)

    def _switched(self, key: tuple[int, str, int]) -> tuple[Sentence, str]:
        """The sentence, its subject or object perhaps named in another language; and the language of its object."""
        index, language, template = key
        subject_language, object_language = (
            self.rng.choice(LANGUAGES) if self.rng.random() < SWITCHED else language for _ in range(2)
        )
        made = self.sentences[key]
        if subject_language == object_language == language:
            return made, language
        subject = self.sentences[index, subject_language, template]
        obj = self.sentences[index, object_language, template]
        spans = sorted(
            [(made.subject, subject.ids[slice(*subject.subject)], 0), (made.object, obj.ids[slice(*obj.object)], 1)]
        )
        ids: list[int] = []
        found: dict[int, tuple[int, int]] = {}
        at = 0
        for (start, stop), label, which in spans:
            ids += made.ids[at:start]
            found[which] = (len(ids), len(ids) + len(label))
            ids += label
            at = stop
        return Sentence((*ids, *made.ids[at:]), found[0], found[1]), object_language

    def _masked(
        self, made: Sentence, key: tuple[int, str, int], object_: float, subject: float
    ) -> tuple[list[int], list[int]]:
        """(input ids, labels) of one sentence; labels are -100 where nothing is predicted. `key` says where rivals come from."""
        rng = self.rng
        ids, labels = list(made.ids), [-100] * len(made.ids)
        start, stop = made.object
        if rng.random() < object_:
            labels[start:stop] = ids[start:stop]
            draw = rng.random()
            if draw < 0.70:
                ids[start:stop] = [MASK] * (stop - start)
            elif draw < 0.90:
                ids[start:stop] = self._rival(key, stop - start)
        if rng.random() < subject:
            start, stop = made.subject
            labels[start:stop] = made.ids[start:stop]
            ids[start:stop] = [MASK] * (stop - start)
        for position in range(len(ids)):
            inside = made.object[0] <= position < made.object[1]
            if labels[position] == -100 and not inside and rng.random() < 0.10:
                labels[position] = ids[position]
                draw = rng.random()
                if draw < 0.8:
                    ids[position] = MASK
                elif draw < 0.9:
                    ids[position] = rng.randrange(FIRST_WORD, self.vocabulary)
        return ids, labels

    def _rival(self, key: tuple[int, str, int], length: int) -> list[int]:
        fact = self.facts[key[0]]
        rivals = self.rivals[fact.relation, key[1], key[2], length]
        for _ in range(8):
            uri, span = self.rng.choice(rivals)
            if uri != fact.object:
                return list(span)
        return [MASK] * length

    def _batch(self, rows: list[list[Masked]], length: int) -> dict[str, torch.Tensor]:
        size = len(rows)
        ids = np.zeros((size, length), np.int64)
        segments, positions = np.zeros_like(ids), np.zeros_like(ids)
        labels = np.full((size, length), -100, np.int64)
        for row, parts in enumerate(rows):
            at = 1
            ids[row, 0] = CLS
            for segment, (tokens, targets) in enumerate(parts):
                stop = at + len(tokens)
                ids[row, at:stop], labels[row, at:stop], ids[row, stop] = tokens, targets, SEP
                segments[row, at : stop + 1] = segment
                positions[row, at : stop + 1] = np.arange(1, len(tokens) + 2)
                at = stop + 1
        flat = labels.reshape(-1)
        chosen = np.flatnonzero(flat != -100)
        capacity = int(
            CAPACITY[len(rows[0])] * flat.size
        )  # a fixed count, so that a compiled step is never compiled anew
        if len(chosen) > capacity:
            chosen = np.sort(np.random.default_rng(self.rng.randrange(2**32)).choice(chosen, capacity, replace=False))
        index = np.zeros(capacity, np.int64)
        target = np.full(capacity, -100, np.int64)
        index[: len(chosen)], target[: len(chosen)] = chosen, flat[chosen]
        arrays = {
            "input_ids": ids,
            "token_type_ids": segments,
            "position_ids": positions,
            "index": index,
            "target": target,
        }
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
        return batch


def _encode(tokenizer: PreTrainedTokenizerFast, fact: Fact, language: str, template: int) -> Sentence:
    subject, obj = fact.labels[language]
    text = sentence(fact.relation, language, template, subject, obj)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marked = sentence(fact.relation, language, template, "\x01" * len(subject), "\x02" * len(obj))

    def span(mark: str) -> tuple[int, int]:
        first, last = marked.index(mark), marked.rindex(mark) + 1
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < last and b > first]
        return inside[0], inside[-1] + 1

    return Sentence(tuple(encoded["input_ids"]), span("\x01"), span("\x02"))
