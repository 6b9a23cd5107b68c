"""Editing at speed: edits a second of our editor beside the published procedure written plainly, at equal steps and equal texts.

    xpatch bench editing --json results.json

Three procedures, back to back in one process, on the same stream of claims: "plain" (plain_editor.py: one edit after the other, a forward of
the whole model at every step), "cached" (`xpatch.edit` with chunk=1: one after the other on cached features) and "chunked" (as it
comes). Finished parts are kept beside the result file. `editing_scale.py` is the same question for thousands of edits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import xpatch
from xpatch.evaluation import predict
from xpatch.zoo.verifier import data

from . import cache, editing_claims, editing_rows, machine, parts, rows, texts, trained_base
from .plain_editor import PlainEditor
from .progress import Steps, steps
from .resident import watching
from .trained_base import Base

PROCEDURES = ("plain", "cached", "chunked")
CODE = ("editing", "plain_editor", "resident")
ROOMS = ("models", "ops", "patches", "editors", "evaluation")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Size:
    """How much of a base is measured: edits of each procedure, memory and watched claims per language, edits evaluated at most."""

    edits: Mapping[str, int]
    memory: int
    watched: int
    asked: int = 128


SIZES = {
    "verifier": Size({"plain": 8, "cached": 16, "chunked": 128}, memory=2000, watched=200),
    "bert-base": Size({"plain": 1, "cached": 4, "chunked": 128}, memory=100, watched=20, asked=32),
}


def base(name: str, seed: int = 0) -> Base:
    """ "verifier": the bundled one. "bert-base": BERT-base's shape, random weights, the verifier's tokenizer.

    Weights are drawn five times as wide as BERT's: with its own 0.02 a random encoder gives nearly the same row for every text.
    """
    if name == "verifier":
        return trained_base.base("verifier")
    if name != "bert-base":
        raise xpatch.XpatchError(f"editing benchmark: no base is called {name!r}; bases are {', '.join(SIZES)}")
    import transformers

    _, tokenizer = xpatch.zoo.load("verifier")
    labels = dict(enumerate(data.LABELS))
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
        id2label=labels, label2id={label: index for index, label in labels.items()},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(config).eval()
    return Base(model, tokenizer, texts.LANGUAGES, {"source": "random weights"})


def run(
    out: str | Path | None = None,
    *,
    bases: Sequence[str] = tuple(SIZES),
    procedures: Sequence[str] = PROCEDURES,
    edits: Mapping[str, int] | None = None,
    steps_each: int | None = None,
    seeds: Sequence[int] = SEEDS,
    given: Mapping[str, tuple[Base, Size]] | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure and return the result as JSON values, written to `out` when it is given.

    edits: procedure -> edits, instead of each base's own number. steps_each: training steps of an edit, by default the preset's.
    given: bases of the caller's by name. work: folder for finished parts, by default beside `out`. overrides: settings of the editor.
    """
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    settings = {**overrides, **({} if steps_each is None else {"steps": steps_each})}
    found: list[dict[str, Any]] = []
    with steps(progress, len(bases) * len(seeds) * len(procedures)) as bar:
        for name in bases:
            subject, size = given[name] if given and name in given else (base(name), SIZES.get(name))
            assert size is not None
            counts = {
                procedure: (edits or size.edits).get(procedure, size.edits[procedure]) for procedure in procedures
            }
            bench = _Bench(name, subject, size, settings, folder, bar)
            for seed in seeds:
                found += [
                    bench.row(procedure, counts[procedure], max(counts.values()), seed) for procedure in procedures
                ]
    summary = editing_rows.summarise(found)
    result = {
        "benchmark": "editing",
        "header": machine.header(seeds, command),
        "overrides": settings,
        "split": editing_claims.SPLIT,
        "rows": summary,
        "speedups": editing_rows.speedups(found),
    }
    result["goals"] = editing_rows.goals(result)
    if out is not None:
        machine.write_json(result, Path(out))
    return result


class _Bench:
    """One base: its claims, and one measurement a procedure and seed."""

    def __init__(
        self, name: str, subject: Base, size: Size, settings: Mapping[str, Any], folder: Path | None, bar: Steps
    ) -> None:
        self._name, self._base, self._size, self._settings = name, subject, size, dict(settings)
        self._folder, self._bar = folder, bar
        self._memory = texts.memory(subject.languages, size.memory)
        self._watched = editing_claims.watched(size.watched, subject.languages)
        self._claims: dict[tuple[int, int], list[data.Claim]] = {}
        self._digest = cache.digest(subject.model) if folder is not None else ""

    def row(self, procedure: str, count: int, most: int, seed: int) -> dict[str, Any]:
        """One procedure on the first `count` of the seed's claims."""
        self._bar.begin(f"{self._name}, {procedure}, seed {seed}")
        decides = {
            "base": self._digest, "procedure": procedure, "edits": count, "seed": seed, "settings": self._settings,
            "memory": self._size.memory, "watched": self._size.watched, "asked": self._size.asked,
        }  # fmt: skip
        found = parts.kept(
            self._folder, f"{self._name}-{procedure}-{seed}", decides,
            lambda: self._measure(procedure, count, most, seed), CODE, ROOMS,
        )  # fmt: skip
        self._bar.end()
        return found

    def _measure(self, procedure: str, count: int, most: int, seed: int) -> dict[str, Any]:
        base, languages = self._base, self._base.languages
        if (seed, most) not in self._claims:
            chosen = editing_claims.needed(base.model, base.tokenizer, most, seed, languages, self._bar.report)
            self._claims[seed, most] = chosen
        claims = self._claims[seed, most][:count]
        requests = editing_claims.requests(claims, languages)
        with watching() as watch:
            begun, cpu = time.perf_counter(), time.process_time()
            patches, memory, used = self._edit(procedure, requests, seed)
            seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        step = -(-len(claims) // self._size.asked)
        report = xpatch.evaluate(
            base.model, base.tokenizer, editing_claims.cases(claims, languages)[::step], patches, locality_test=self._watched,
            needed=[request.id for request in requests[::step]],
        )  # fmt: skip
        values = rows.values(report.metrics)
        return {
            "base": self._name,
            "method": "mpn",
            "preset": "default",
            "procedure": procedure,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "edits": len(claims),
            "asked": report.edits,
            "steps": used["steps"],
            "seconds": round(seconds, 3),
            "memory_seconds": round(memory[0], 3),
            "cpu_seconds": round(cpu, 3),
            "memory_cpu_seconds": round(memory[1], 3),
            "edits_per_s": float(f"{len(claims) / (seconds - memory[0]):.4g}"),
            "edits_per_cpu_s": float(f"{len(claims) / (cpu - memory[1]):.4g}"),
            "right": editing_rows.all_right(report),
            "reliability": values["reliability"],
            "clg_avg": values["clg_avg"],
            "clg_unseen_avg": values["clg_unseen_avg"],
            "locality": values["unchanged_avg"],
            "neurons": rows.neurons(patches),
            "peak_mb": watch.peak_mb,
        }

    def _edit(
        self, procedure: str, requests: Sequence[Any], seed: int
    ) -> tuple[Any, tuple[float, float], Mapping[str, Any]]:
        """The patches, what reading the memory took (by the clock, of the processor), and the settings used."""
        base = self._base
        options = {"method": "mpn", "seed": seed, "memory": self._memory, **self._settings}
        if procedure == "plain":
            used = _hyperparameters(base, self._settings)
            if used["early_stop"]:
                raise xpatch.XpatchError("the plain procedure runs all its steps; compare with early_stop=False")
            made = PlainEditor(base.model, base.tokenizer, used, seed).edit(requests, self._memory)
            return made.patches, (made.memory_seconds, made.memory_cpu_seconds), used
        if procedure == "cached":
            options["chunk"] = 1
        elif procedure != "chunked":
            raise xpatch.XpatchError(f"no procedure {procedure!r}; procedures are {', '.join(PROCEDURES)}")
        reading = _Reading(self._bar)
        patches = xpatch.edit(base.model, base.tokenizer, requests, progress=reading, **options)
        versions = [version for request in requests for version in request.versions.values()]
        own = {text for version in versions for text in (version.text, *(probe.text for probe in version.rephrases))}
        return patches, reading.share(len(own)), patches.edits[0].hyperparameters


class _Reading:
    """Times the reading of texts from an editor's progress, and hands the progress on."""

    def __init__(self, bar: Steps) -> None:
        self._bar, self._total = bar, 0
        self._begun = self._ended = (time.perf_counter(), time.process_time())

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "reading":
            self._ended, self._total = (time.perf_counter(), time.process_time()), total
        self._bar.report(stage, done, total)

    def share(self, own: int) -> tuple[float, float]:
        """Seconds of the texts that are not the edits' `own`: the memory is read in one go with them, in order of length."""
        part = max(0, self._total - own) / max(self._total, 1)
        return part * (self._ended[0] - self._begun[0]), part * (self._ended[1] - self._begun[1])


def _hyperparameters(base: Base, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The editor's settings as its ledger names them, from an edit that is right already and trains nothing."""
    text = texts.memory(base.languages[:1], 1)[base.languages[0]][0]
    request = {
        "id": "0",
        "text": text,
        "target": predict(base.model, base.tokenizer, [text])[0],
        "language": base.languages[0],
    }
    made = xpatch.edit(base.model, base.tokenizer, [request], method="mpn", memory={}, progress=False, **settings)
    return dict(made.edits[0].hyperparameters)
