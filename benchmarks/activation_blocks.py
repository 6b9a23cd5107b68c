"""Thousands of neurons to compare gates on: which claims, and their training in blocks on disk.

A block is one `xpatch.edit` call over the next claims on the plain model; the canonical texts of the claims before it belong to its
memory. Blocks are put side by side, as sets of patches are in a served model: nothing is trained again afterwards.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import xpatch
from xpatch import EditRequest
from xpatch.evaluation import predict
from xpatch.zoo.verifier import data

from . import texts, trained_neurons
from .protocol import INVERSE, TRAINED, UNSEEN, Protocol, bundled
from .trained_base import Base, Report, write

BLOCK = 512  # claims of one edit call, at most
MEMORY = 500  # bundled claims per language that a block must leave alone
EARLIER = 200  # and the same number of claims of earlier blocks


@dataclass(frozen=True)
class Neurons:
    """keys `[N, D]`, bias `[N]`, values `[N, D]`, activation; ends: how many of the first neurons belong to the first 1, 2 ... claims."""

    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    activation: str
    ends: Sequence[int]

    def first(self, claims: int) -> Neurons:
        """The neurons of the first claims."""
        count = self.ends[claims - 1] if claims else 0
        return replace(
            self, keys=self.keys[:count], bias=self.bias[:count], values=self.values[:count], ends=self.ends[:claims]
        )


def many(base: Base, count: int, locality: int | None, seed: int, store: Path | None, report: Report) -> Protocol:
    """At least `count` claims, in whole blocks, about the edit split that `base` answers wrongly in any of its languages, and locality claims about other subjects.

    The claims are `texts.claims(seed)` in their order, those of facts stated the other way round left out. Which of them are needed
    is kept in `store`.
    """
    count = -(-count // BLOCK) * BLOCK  # whole blocks: they can be kept when more are asked for
    found = list(itertools.islice(_needed(base, seed, store, report), count))
    if len(found) < count:
        raise xpatch.XpatchError(f"asked for {count} claims that are answered wrongly, there are {len(found)}")
    edited = {text for item in found for language in base.languages for text in item.texts[language]}
    parts, groups = other_subjects(base, edited, locality)

    def asked(wordings: Sequence[int]) -> list[EditRequest]:
        return [texts.request(item, number, base.languages, wordings) for number, item in enumerate(found)]

    return Protocol(asked(TRAINED), asked(UNSEEN), parts["train"], parts["test"], groups)


def _needed(base: Base, seed: int, store: Path | None, report: Report, batch: int = 1000) -> Iterator[data.Claim]:
    """The claims `base` gets wrong, read in batches; `store` holds one line of flags a batch."""
    known = {(fact.relation, fact.subject, fact.object) for fact in data.facts()}
    single = (
        item
        for item in texts.claims(seed)
        if (INVERSE.get(item.fact.relation), item.fact.object, item.fact.subject) not in known
    )
    lines = store.read_text(encoding="utf-8").split() if store is not None and store.is_file() else []
    done = 0
    for number in itertools.count():
        claims = list(itertools.islice(single, batch))
        if number >= len(lines):
            asked = [item.texts[language][0] for item in claims for language in base.languages]
            gold = [item.label for item in claims for _ in base.languages]
            wrong = [a != b for a, b in zip(predict(base.model, base.tokenizer, asked), gold, strict=True)]
            base.forget()
            size = len(base.languages)
            lines.append("".join("01"[any(wrong[i * size : (i + 1) * size])] for i in range(len(claims))))
            if store is not None:
                store.parent.mkdir(parents=True, exist_ok=True)
                temporary = store.with_name(store.name + ".tmp")
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
                temporary.replace(store)
        done += lines[number].count("1")
        report("needed", done, done)
        yield from (item for item, flag in zip(claims, lines[number], strict=True) if flag == "1")


def trained(
    base: Base, requests: Sequence[EditRequest], count: int, settings: Mapping[str, Any], seed: int, folder: Path | None, *,
    memory: Mapping[str, Sequence[Any]] | None = None, block: int = BLOCK, report: Report | None = None,
) -> Neurons:  # fmt: skip
    """At least the neurons of the first `count` of `requests`, in their order, in whole blocks. folder: where blocks are kept."""
    spared = texts.memory(base.languages, MEMORY) if memory is None else memory
    parts: list[dict[str, torch.Tensor]] = []
    ends: list[int] = []
    activation = ""
    for start in range(0, count, block):
        path = None if folder is None else folder / f"{start:05}-{min(start + block, len(requests)):05}.safetensors"
        if path is not None and path.is_file():
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("keys", "bias", "values")}
                header = file.metadata()
        else:
            tensors, header = _block(base, requests, start, block, settings, seed, spared, report)
            if path is not None:
                write(path, tensors, header)
        offset = sum(len(part["bias"]) for part in parts)
        ends += [offset + end for end in json.loads(header["ends"])]
        activation = header["activation"]
        parts.append(tensors)
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("keys", "bias", "values")}
    return Neurons(**joined, activation=activation, ends=ends)


def _block(
    base: Base, requests: Sequence[EditRequest], start: int, block: int, settings: Mapping[str, Any], seed: int,
    spared: Mapping[str, Sequence[Any]], report: Report | None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:  # fmt: skip
    chosen = requests[start : start + block]
    earlier = random.Random(f"earlier:{seed}:{start}").sample(range(start), min(EARLIER, start))
    memory = {
        language: [*found, *(requests[i].versions[language].text for i in earlier)]
        for language, found in spared.items()
    }
    patches = xpatch.edit(
        base.model, base.tokenizer, chosen, method="mpn", memory=memory, seed=seed, progress=report or False, **settings
    )
    base.forget()
    part = next(iter(patches.parts.values()), None)
    owned = {record.id: [row for rows in record.rows.values() for row in rows] for record in patches.edits}
    ends = list(itertools.accumulate(len(owned[request.id]) for request in chosen))
    if not isinstance(part, xpatch.PatchNeurons):
        width = base.model.config.hidden_size
        empty = torch.zeros(0, width)
        return {"keys": empty, "bias": empty[:, 0].clone(), "values": empty.clone()}, {
            "ends": json.dumps(ends),
            "activation": str(settings.get("activation", "relu")),
        }
    order = torch.tensor([row for request in chosen for row in owned[request.id]], dtype=torch.long)
    tensors = {name: getattr(part, name)[order] for name in ("keys", "bias", "values")}
    return tensors, {"ends": json.dumps(ends), "activation": part.activation}


def gathered(base: Base, preset: str, blocks: int, seed: int, folder: Path | None, report: Report | None) -> Neurons:
    """The neurons of `trained_neurons.gather` in the first `blocks` blocks; `ends` counts them by block, not by claim."""
    ends: list[int] = []
    while len(ends) < blocks:
        found = trained_neurons.gather(base, preset, 1 + (ends[-1] if ends else 0), seed, folder=folder, report=report)
        ends.append(len(found.bias))
    return Neurons(found.keys, found.bias, found.values, found.activation, ends)


def gathered_cases(base: Base, blocks: int, seed: int, sample: int) -> list[EditRequest]:
    """Of a seeded choice among the claims of `gathered`, those `base` answers wrongly in any language, with unseen paraphrases."""
    claims = list(itertools.islice(texts.claims(seed), blocks * trained_neurons.BLOCK))
    places = sorted(random.Random(f"sample:{seed}:{blocks}").sample(range(len(claims)), min(sample, len(claims))))
    asked = [claims[i].texts[language][0] for i in places for language in base.languages]
    found = predict(base.model, base.tokenizer, asked)
    size = len(base.languages)
    return [
        texts.request(claims[i], i, base.languages, UNSEEN)
        for row, i in enumerate(places)
        if any(answer != claims[i].label for answer in found[row * size : (row + 1) * size])
    ]


def other_subjects(base: Base, edited: set[str], locality: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Locality claims about other subjects, none of them a text of `edited`: kind -> language -> probes; kind -> subjects."""
    other = bundled(1, locality)
    parts, groups = {}, {}
    for kind, probes in (("train", other.locality_train), ("test", other.locality_test)):
        places = range(len(other.groups[kind]))
        kept = [i for i in places if not any(probes[k][i].text in edited for k in base.languages)]
        parts[kind] = {language: [probes[language][i] for i in kept] for language in base.languages}
        groups[kind] = [other.groups[kind][i] for i in kept]
    return parts, groups
