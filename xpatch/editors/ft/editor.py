"""Fine-tuning of the final FFN, one edit after the other: the baseline of the MPN paper's tables."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.ft.config import PRESETS, FineTuneConfig
from xpatch.editors.ft.train import Objective, TrainableFFN
from xpatch.editors.t_patcher.train import ACTIVATE
from xpatch.editors.task import Outcome, Product, Task
from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite
from xpatch.patches.types import DenseDelta

GROUP = "ft"


class FineTuneEditor:
    """Trains on the edit's own language. All edits share the two deltas, so they form one group."""

    info = MethodInfo(
        name="ft",
        title="Fine-tuning (last FFN)",
        paper="The baseline of Si, Zhang and Zhang 2024 (MPN), with Transformer-Patcher's fine-tuning settings",
        url="https://arxiv.org/abs/2401.03190",
        edits="sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2), single texts and pairs; the edit's own language",
        separable=False,
    )
    presets: Mapping[str, FineTuneConfig] = PRESETS

    def edit(self, task: Task, config: FineTuneConfig) -> Product:
        """Train on `task`; every tensor of the result is on the CPU."""
        _check(task.site)
        rows = task.cache.want(edit.versions[0].probe for edit in task.edits)
        memory = self._memory(task, config, set(rows))
        task.cache.fill(task.report)
        device = task.cache.x.device
        ffn = TrainableFFN(task.model, task.site)
        objective = Objective(
            ffn, task.cache, task.head.tail, torch.tensor(memory, dtype=torch.long, device=device), config
        )
        labels = torch.tensor([edit.versions[0].label for edit in task.edits], device=device)
        index = torch.tensor(rows, device=device)
        trained: dict[int, tuple[bool, float]] = {}
        for number, edit in enumerate(task.edits):
            begun = time.perf_counter()
            here = slice(number, number + 1)
            with torch.no_grad():
                right = bool((objective.logits(index[here]).argmax(-1) == labels[here]).all())
            if not right:
                fitted = objective.fit(index[here], labels[here], task.generator("memory", edit.request.id))
                trained[number] = (fitted, time.perf_counter() - begun)
            task.report("training", number + 1, len(task.edits))
        with torch.no_grad():
            final = objective.logits(index).argmax(-1) == labels
        outcomes = [
            self._outcome(task, number, bool(final[number]), trained.get(number)) for number in range(len(task.edits))
        ]
        return Product(_parts(ffn, task.site) if trained else {}, outcomes)

    def _memory(self, task: Task, config: FineTuneConfig, edited: set[int]) -> list[int]:
        if not config.memory_weight:
            return []
        languages = {edit.versions[0].language for edit in task.edits}
        own = any(language in languages for language in task.memory)
        probes = [p for language, texts in task.memory.items() if not own or language in languages for p in texts]
        task.rng("memory").shuffle(probes)
        return [row for row in dict.fromkeys(task.cache.want(probes[: config.memory_rows])) if row not in edited]

    def _outcome(self, task: Task, number: int, right: bool, trained: tuple[bool, float] | None) -> Outcome:
        language = task.edits[number].versions[0].language
        cut = task.cache.want([task.edits[number].versions[0].probe])[0] in task.cache.cut
        note = " (text cut at the model's length limit)" if cut else ""
        if trained is None:
            if right:
                return Outcome("already-right", f"right in {language} when its turn came{note}")
            return Outcome("lost", f"was right, but other edits changed the shared weights: wrong in {language}{note}")
        fitted, seconds = trained
        if right:
            status, message = "edited", f"right in {language}"
        elif fitted:
            status, message = "lost", f"was right, but other edits changed the shared weights: wrong in {language}"
        else:
            status, message = "failed", f"still wrong in {language}"
        return Outcome(status, message + note, {"up": (), "down": ()}, GROUP, seconds)  # type: ignore[arg-type]


def _parts(ffn: TrainableFFN, site: FFNSite) -> dict[str, DenseDelta]:
    up, up_bias, down, down_bias = ffn.deltas()
    assert up is not None and down is not None  # every linear has a weight
    return {"up": DenseDelta(site.up, up, up_bias), "down": DenseDelta(site.down, down, down_bias)}


def _check(site: FFNSite) -> None:
    if site.kind != "plain":
        found = "gated" if site.kind == "gated" else "a mixture of experts"
        raise MismatchError(
            f"FFN {site.name!r} is {found}; fine-tuning knows FFNs of two linears; use method 't-patcher' or 'mpn'"
        )
    if site.activation not in ACTIVATE:
        raise MismatchError(f"FFN {site.name!r} has the activation {site.activation!r}; known: {', '.join(ACTIVATE)}")


register(FineTuneEditor())
