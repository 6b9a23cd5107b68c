"""`mpn-masked`: first the masks, on the first edits; then MPN's own procedure on masked rows.

LiME (Xu et al. 2022) scales what an editor sees by a mask per language; MPN says that this is out of reach for patch neurons. It is
not: `act((x ⊙ m[language]) Kᵀ + b) V` is a neuron whose key is seen by each language in its own scale. The edits' own language keeps
a mask of ones, so a call that names no language is served as that language is.
"""

from __future__ import annotations

import collections
import dataclasses

import torch

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.mpn_masked.config import PRESETS, MaskedConfig
from xpatch.editors.mpn_masked.masks import Lesson, learn
from xpatch.editors.mpn_masked.rows import MaskedRows, spoken
from xpatch.editors.samplers import all_parallel
from xpatch.editors.t_patcher.config import NeuronConfig
from xpatch.editors.t_patcher.editor import PART, PatchNeuronEditor, _activation
from xpatch.editors.task import Edit, Product, Task, Wording
from xpatch.errors import MismatchError
from xpatch.patches.masks import fold
from xpatch.patches.types import LanguageMask, PatchNeurons

GROUP = "languages"


class MaskedEditor(PatchNeuronEditor):
    """MPN (all) behind one mask per language."""

    def edit(self, task: Task, config: NeuronConfig) -> Product:
        """Learn masks, then train neurons on masked rows; the product names the masks, or has one folded in."""
        if not isinstance(config, MaskedConfig):
            raise TypeError(f"expected a MaskedConfig, found {type(config).__name__}")
        languages = tuple(dict.fromkeys(language for edit in task.edits for language in edit.languages))
        if config.fold is not None and config.fold not in languages:
            raise MismatchError(
                f"fold: no request has a version in {config.fold!r}; languages there are: {', '.join(languages)}"
            )
        cache = MaskedRows(task.cache, languages)
        task = dataclasses.replace(spoken(task), cache=cache)
        inner = _masks(task, cache, languages, config)
        if inner is not None:
            cache.mask(inner)
        product = super().edit(task, config)
        part = product.parts.get(PART)
        if inner is None or not isinstance(part, PatchNeurons):
            return product
        mask = LanguageMask(languages, inner.cpu(), torch.ones(inner.shape))
        if config.fold is not None:
            return dataclasses.replace(product, parts={PART: fold(part, mask, config.fold)})
        return dataclasses.replace(product, parts={PART: dataclasses.replace(part, mask=GROUP)}, masks={GROUP: mask})


def _masks(task: Task, cache: MaskedRows, languages: tuple[str, ...], config: MaskedConfig) -> torch.Tensor | None:
    """inner `[L, D]`; None where there are too few edits to learn from."""
    parallel = [edit for edit in task.edits if len(edit.languages) > 1]
    wanted = {edit.request.id: cache.want(w.probe for w in _texts(edit, config)) for edit in parallel}
    if len(parallel) < config.mask_least:
        return None
    known = {(w.probe.text, w.probe.text_pair) for edit in parallel for w in (*edit.versions, *edit.rephrases)}
    own = {edit.versions[0].language for edit in task.edits}
    narrow = config.memory_languages == "own" and not own.isdisjoint(task.memory)
    probes = [p for language, found in task.memory.items() if not narrow or language in own for p in found]
    task.rng("memory").shuffle(probes)  # as the neurons' memory is drawn: few further texts are read
    kept = [p for p in probes if (p.text, p.text_pair) not in known][: config.memory_rows]
    memory = list(dict.fromkeys(cache.want(kept)))
    cache.fill(task.report)
    answers = cache.logits.argmax(-1).tolist()

    def wrong(edit: Edit) -> bool:
        rows = wanted[edit.request.id]
        return any(answers[row] != w.label for row, w in zip(rows, edit.versions, strict=False))

    chosen = [edit for edit in parallel if wrong(edit)][: config.mask_edits]
    if len(chosen) < config.mask_least:
        return None
    device = cache.x.device
    found = [wanted[edit.request.id] for edit in chosen]
    labels = [[w.label for w in _texts(edit, config)] for edit in chosen]
    width = max(map(len, found))
    lesson = Lesson(
        rows=torch.tensor([[rows[i % len(rows)] for i in range(width)] for rows in found], device=device),
        labels=torch.tensor([[names[i % len(names)] for i in range(width)] for names in labels], device=device),
        memory=torch.tensor(memory, dtype=torch.long, device=device),
    )
    reference, _ = collections.Counter(edit.versions[0].language for edit in chosen).most_common(1)[0]
    spoken_by = {language for edit in chosen for language in edit.languages} - {reference}
    learned = [number for number, language in enumerate(languages) if language in spoken_by]

    def make() -> dict[str, torch.Tensor]:
        inner = learn(
            lesson, cache, learned, len(languages), config, task.head.tail, _activation(task, config), task.generator("masks"),
            lambda share: task.report("masks", round(100 * share), 100),
        )  # fmt: skip
        return {"inner": inner}

    step = task.journal.once({"masks": [edit.request.id for edit in chosen]}, make)
    return step.tensors["inner"].to(device)


def _texts(edit: Edit, config: MaskedConfig) -> tuple[Wording, ...]:
    return (*edit.versions, *(edit.rephrases if config.rephrases else ()))


register(
    MaskedEditor(
        MethodInfo(
            name="mpn-masked",
            title="MPN (masked)",
            paper="Ours: the language masks of Xu et al. 2022 (LiME) on the neurons of Si, Zhang and Zhang 2024 (MPN)",
            url="https://arxiv.org/abs/2205.12677",
            edits="sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2), single texts and pairs; every language given",
            separable=True,
            resumes=True,
        ),
        PRESETS,
        all_parallel,
    )
)
