"""Editing with a trained hyper-network: each edit is made from the base alone; their low-rank changes add up in one set."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xpatch.editors.base import MethodInfo
from xpatch.editors.hyper.config import EDIT_PRESETS, HyperEditConfig
from xpatch.editors.hyper.folder import WEIGHTS, EditorCard, fill, read_card, read_tensors
from xpatch.editors.hyper.kinds import blueprint, kind_of, network_of
from xpatch.editors.hyper.lowrank import Factors, side_path
from xpatch.editors.hyper.network import HyperNetwork
from xpatch.editors.hyper.objective import Trial
from xpatch.editors.hyper.sites import EditedLinear, edited_linears
from xpatch.editors.hyper.texts import Encoder
from xpatch.editors.presets import resolve
from xpatch.editors.task import Edit, Outcome, Product, Task, Wording
from xpatch.errors import FormatError, MismatchError
from xpatch.patches.identity import first_difference, identify
from xpatch.patches.types import LowRankDelta, Part


@dataclass(frozen=True, eq=False)
class Editor:
    """A trained editor on its base, ready to edit."""

    card: EditorCard
    network: HyperNetwork
    trial: Trial


def open_editor(task: Task, method: str, folder: str | None) -> Editor:
    """Load `folder` for the task's model.

    Raises `FormatError` (no editor there, damaged, of another method), `MismatchError` (trained for another base).
    """
    if folder is None:
        raise FormatError(
            f"method {method!r} needs a trained editor: give editor=FOLDER; train one with "
            f"xpatch.train_editor(model, tokenizer, data, method={method!r}, out=FOLDER)"
        )
    card = read_card(Path(folder))
    if card.method != method:
        raise FormatError(f"editor {folder}: expected one of method {method!r}, found {card.method!r}; give its method")
    difference = first_difference(card.base, identify(task.model, task.tokenizer, site=task.site.name))
    if difference is not None:
        raise MismatchError(
            f"editor {folder} was trained for another base: {difference.split('; ')[0]}; "
            "edit the model it was trained for, or train an editor for this one"
        )
    settings = resolve(method, {"": kind_of(method).presets["default"]}, "", card.settings)
    linears = edited_linears(task.model, settings.layers, settings.matrices)
    named = tuple(EditedLinear(item.name, item.inside, item.outside) for item in card.linears)
    if linears != named:
        raise FormatError(f"editor {folder}: its linears are not those of this model; train the editor again")
    encoder = Encoder(task.model, task.tokenizer)
    labels: Any = task.model.config.id2label  # type: ignore[union-attr]  # of a Hugging Face model
    names = [str(labels[index]) for index in range(task.head.labels)]
    text = getattr(settings, "condition_text", "input")
    network = network_of(method, blueprint(method, task.model, linears, card.languages, settings, card.seed))
    tensors, _ = read_tensors(Path(folder) / WEIGHTS)
    fill(network, tensors, Path(folder) / WEIGHTS)
    network.to(encoder.device).eval().requires_grad_(False)
    return Editor(card, network, Trial(task.model, encoder, linears, names, text))


class HyperEditor:
    """The editor of `ke`, `mend`, `lime-ke` and `lime-mend`: they differ in their networks alone."""

    presets: Mapping[str, HyperEditConfig] = EDIT_PRESETS

    def __init__(self, info: MethodInfo) -> None:
        self.info = info

    def edit(self, task: Task, config: HyperEditConfig) -> Product:
        """Edit with the trained network; every tensor of the result is on the CPU."""
        editor = open_editor(task, self.info.name, config.editor)
        return _Run(task, config, editor).product()


class _Run:
    """One edit call."""

    def __init__(self, task: Task, config: HyperEditConfig, editor: Editor) -> None:
        self.task, self.config, self.editor = task, config, editor
        self.model, self.encoder = task.model, editor.trial.encoder
        self.size = config.batch_size if self.encoder.batched else 1
        self.seconds = dict.fromkeys(range(len(task.edits)), 0.0)
        self.alone: dict[int, bool] = {}
        self.kept: dict[str, list[tuple[int, Factors]]] = {item.name: [] for item in editor.trial.linears}

    def product(self) -> Product:
        edits = self.task.edits
        before = self.answers(list(range(len(edits))), {})
        wanted = [number for number in range(len(edits)) if self.config.edit_right or self.wrong(number, before)]
        self.check_languages(wanted)
        done = len(edits) - len(wanted)
        for start in range(0, len(wanted), self.size):
            chunk = wanted[start : start + self.size]
            begun = time.perf_counter()
            self.take(chunk)
            for number in chunk:
                self.seconds[number] = (time.perf_counter() - begun) / len(chunk)
            done += len(chunk)
            self.task.report("training", done, len(edits))
        parts, rows = self.parts()
        together = self.together()
        after = self.answers(list(range(len(edits))), together) if together else before
        return Product(parts, [self.outcome(number, after, rows) for number in range(len(edits))])

    def required(self, number: int) -> Sequence[Wording]:
        """The versions that decide."""
        versions = self.task.edits[number].versions
        return versions if self.config.decide == "all" else versions[:1]

    def wrong(self, number: int, answers: Mapping[int, list[int]]) -> list[str]:
        """Languages whose deciding text gets another answer than asked for."""
        return [
            wording.language
            for wording, answer in zip(self.required(number), answers[number], strict=True)
            if answer != wording.label
        ]

    def check_languages(self, wanted: Sequence[int]) -> None:
        """Raise `MismatchError` for an edit in a language the editor has no mask for, before any work."""
        if not kind_of(self.editor.card.method).masked:
            return
        for number in wanted:
            edit: Edit = self.task.edits[number]
            language = edit.versions[0].language
            if language not in self.editor.card.languages:
                raise MismatchError(
                    f"request {edit.request.id!r} is in {language!r}, for which the editor has no mask; its languages: "
                    f"{', '.join(self.editor.card.languages)}; write the request in one of these, or train an editor with "
                    "this language among its edit languages"
                )

    def take(self, chunk: Sequence[int]) -> None:
        """Make the changes of these edits, each from the base alone, and see whether each is right alone."""
        own = [self.task.edits[number].versions[0] for number in chunk]
        probes = [wording.probe for wording in own]
        labels = torch.tensor([wording.label for wording in own], device=self.encoder.device)
        signals, _, logits = self.editor.trial.signals(probes, lambda _: labels)
        with torch.no_grad():
            condition = self.editor.trial.condition(
                probes, [wording.language for wording in own], logits.argmax(-1), labels
            )
            factors = self.editor.network(signals, condition)
        alone = self.answers(chunk, factors, apart=True)
        for place, number in enumerate(chunk):
            self.alone[number] = not self.wrong(number, alone)
            if self.alone[number] or self.config.keep_failed:
                for name, found in factors.items():
                    self.kept[name].append((number, found.of(place)))

    def answers(
        self, numbers: Sequence[int], factors: Mapping[str, Factors], apart: bool = False
    ) -> dict[int, list[int]]:
        """Edit -> the answers to its deciding texts: with `factors` as one change, or (`apart`) each edit with its own alone."""
        texts = [(number, wording.probe) for number in numbers for wording in self.required(number)]
        found: dict[int, list[int]] = {number: [] for number in numbers}
        if apart:
            most = max(len(self.required(number)) for number in numbers)
            texts = [
                (number, self.required(number)[place % len(self.required(number))].probe)
                for number in numbers
                for place in range(most)
            ]
            for number, answer in zip(
                (number for number, _ in texts), self._ask([p for _, p in texts], factors, len(numbers)), strict=True
            ):
                found[number].append(answer)
            return {number: answers[: len(self.required(number))] for number, answers in found.items()}
        order = sorted(range(len(texts)), key=lambda index: len(self.encoder.encode(texts[index][1])["input_ids"]))
        answers = [0] * len(texts)
        step = 64 if self.encoder.batched else 1
        for start in range(0, len(order), step):
            places = order[start : start + step]
            for place, answer in zip(places, self._ask([texts[i][1] for i in places], factors, 1), strict=True):
                answers[place] = answer
            self.task.report("reading", min(start + step, len(order)), len(order))
        for (number, _), answer in zip(texts, answers, strict=True):
            found[number].append(answer)
        return found

    def together(self) -> dict[str, Factors]:
        """All changes kept, as one."""
        found = {}
        for name, kept in self.kept.items():
            if kept:
                down, up = torch.cat([f.down for _, f in kept]), torch.cat([f.up for _, f in kept])
                found[name] = Factors(down, up, torch.zeros(len(down), dtype=torch.long, device=down.device))
        return found

    def parts(self) -> tuple[dict[str, Part], dict[int, dict[str, tuple[int, ...]]]]:
        """One low-rank part per linear, and the ranks each edit owns."""
        parts: dict[str, Part] = {}
        rows: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, kept in self.kept.items():
            start = 0
            for number, found in kept:
                if len(found.down):
                    rows.setdefault(number, {})[name] = tuple(range(start, start + len(found.down)))
                    start += len(found.down)
            if start:
                down, up = torch.cat([f.down for _, f in kept]), torch.cat([f.up for _, f in kept])
                parts[name] = LowRankDelta(name, down.cpu(), up.T.cpu())
        return parts, rows

    def outcome(
        self, number: int, after: Mapping[int, list[int]], rows: Mapping[int, Mapping[str, tuple[int, ...]]]
    ) -> Outcome:
        """What became of one request, with all changes in place."""
        wrong = self.wrong(number, after)
        languages = ", ".join(wording.language for wording in self.required(number))
        cut = any(self.encoder.is_cut(wording.probe) for wording in self.required(number))
        note = " (text cut at the model's length limit)" if cut else ""
        if number not in self.alone:
            if not wrong:
                return Outcome("already-right", f"right in {languages} before editing{note}")
            return Outcome("lost", f"needed no edit, but other edits made it wrong in {', '.join(wrong)}{note}")
        owned, seconds = rows.get(number, {}), self.seconds[number]
        if not self.alone[number] and not (owned and not wrong):
            kept = "" if owned else "; nothing is kept"
            return Outcome(
                "failed", f"wrong even alone, in its deciding texts ({languages}){kept}{note}", owned, None, seconds
            )
        if wrong:
            return Outcome(
                "lost",
                f"right alone, but wrong beside the other edits in {', '.join(wrong)}{note}",
                owned,
                None,
                seconds,
            )
        return Outcome("edited", f"right in {languages}{note}", owned, None, seconds)

    @torch.no_grad()
    def _ask(self, probes: list, factors: Mapping[str, Factors], edits: int) -> list[int]:
        if not self.encoder.batched and len(probes) > 1:
            assert edits == 1  # without a padding token edits come one by one
            return [answer for probe in probes for answer in self._ask([probe], factors, 1)]
        with side_path(self.model, factors, edits):
            return self.model(**self.encoder(probes)).logits.argmax(-1).tolist()
