"""CaliNet (Dong et al. 2022): a few memory slots beside the final FFN, trained on all facts in one go."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.calinet.config import PRESETS, CaliNetConfig
from xpatch.editors.calinet.train import Slots
from xpatch.editors.rows import EditRows, Trained
from xpatch.editors.t_patcher.train import ACTIVATE
from xpatch.editors.task import Product, Task
from xpatch.errors import MismatchError
from xpatch.patches.types import PatchNeurons

PART, GROUP = "slots", "calinet"


class CaliNetEditor:
    """No slot belongs to an edit, so all edits form one group."""

    info = MethodInfo(
        name="calinet",
        title="CaliNet",
        paper="Dong et al. 2022, Calibrating Factual Knowledge in Pretrained Language Models, Findings of EMNLP",
        url="https://arxiv.org/abs/2210.03329",
        edits="sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2, Llama-like), single texts and pairs; language models (encoder-decoders, "
        "decoders, masked); many edits at once; the edit's own language, or as train_languages says",
        separable=False,
        models=("classifier", "causal", "seq2seq", "masked"),
    )
    presets: Mapping[str, CaliNetConfig] = PRESETS
    lm_presets: Mapping[str, CaliNetConfig] = PRESETS

    def edit(self, task: Task, config: CaliNetConfig) -> Product:
        """Train on `task`; every tensor of the result is on the CPU."""
        activation = task.site.activation if config.activation == "ffn" else config.activation
        if activation not in ACTIVATE:
            raise MismatchError(
                f"FFN {task.site.name!r} has the activation {activation!r}, which slots cannot share; known: {', '.join(ACTIVATE)}; "
                "choose the gate yourself with activation='relu'"
            )
        rows = EditRows(task, "calinet", config, memory=bool(config.memory_weight))
        everything = range(len(task.edits))
        needed = [n for n, wrong in zip(everything, rows.wrong(everything, task.cache.answers), strict=True) if wrong]
        spared = [row for n in everything if n not in set(needed) for row in rows.plans[n].rows]
        if not needed:
            task.report("training", len(task.edits), len(task.edits))
            rows.listen([[]] * len(everything), torch.zeros_like)
            return Product({}, [rows.outcome(number, (), None) for number in everything])
        begun = time.perf_counter()
        slots = Slots(task, config, activation)
        pairs = [rows.of(number) for number in needed]
        slots.fit(
            torch.cat([row for row, _ in pairs]),
            torch.cat([label for _, label in pairs]),
            # What other requests find right already must stay so as well.
            torch.cat((rows.memory, torch.tensor(spared, dtype=torch.long, device=rows.device))),
            task.generator("memory"),
            lambda share: task.report("training", int(share * len(task.edits)), len(task.edits)),
        )
        seconds = (time.perf_counter() - begun) / len(needed)
        found = rows.wrong(everything, slots.logits)
        rows.listen(found, slots.added)
        outcomes = [
            rows.outcome(
                number,
                wrong,
                Trained(not wrong, seconds) if number in needed else None,
                {PART: ()},
                GROUP,
                "the slots are shared",
            )
            for number, wrong in zip(everything, found, strict=True)
        ]
        part = PatchNeurons(task.site.name, slots.keys.cpu(), slots.bias.cpu(), slots.values.cpu(), activation)
        return Product({PART: part}, outcomes)


register(CaliNetEditor())
