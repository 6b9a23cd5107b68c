"""FT-L (Meng et al. 2022): fine-tune one FFN down-projection, no weight further from the base than a small bound."""

from __future__ import annotations

import time
from collections.abc import Mapping

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.ft_l.config import PRESETS, ConstrainedConfig
from xpatch.editors.ft_l.train import BoxedTraining, FinalLayer, InnerLayer, Layer
from xpatch.editors.rows import EditRows, Trained
from xpatch.editors.t_patcher.train import ACTIVATE
from xpatch.editors.task import Product, Task
from xpatch.errors import FormatError, MismatchError
from xpatch.models.anatomy import FFNSite, find_ffn_sites
from xpatch.patches.types import DenseDelta

PART, GROUP = "down", "ft-l"


class ConstrainedFineTuneEditor:
    """All edits share the one delta, so they form one group."""

    info = MethodInfo(
        name="ft-l",
        title="FT-L",
        paper="Meng et al. 2022, Locating and Editing Factual Associations in GPT (its baseline FT+L, after Zhu et al. 2020), NeurIPS",
        url="https://arxiv.org/abs/2202.05262",
        edits="sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2, Llama-like), single texts and pairs; one down-projection of any "
        "FFN that is no mixture of experts; language models (GPT-2, BLOOM, BART, mBART, T5, BERT): the final one, of two linears; the edit's own "
        "language, or as train_languages says",
        separable=False,
        models=("classifier", "causal", "seq2seq", "masked"),
    )
    presets: Mapping[str, ConstrainedConfig] = PRESETS
    lm_presets: Mapping[str, ConstrainedConfig] = PRESETS

    def edit(self, task: Task, config: ConstrainedConfig) -> Product:
        """Train on `task`; every tensor of the result is on the CPU."""
        site = _site(task, config)
        rows = EditRows(task, "ft-l", config, memory=bool(config.memory_weight))
        quick = site == task.site and site.kind == "plain" and site.activation in ACTIVATE
        if task.decoding is not None and not quick:
            raise MismatchError(
                f"ft-l trains the down-projection of {site.name!r}; in a language model it can train that of the final FFN "
                f"({task.site.name!r}) alone, where that is two linears around a known activation; leave layer out, or use method 'mpn'"
            )
        layer: Layer = FinalLayer(task) if quick else InnerLayer(task, site)
        training = BoxedTraining(layer, task.cache.answers, rows.memory, config)
        trained: dict[int, Trained] = {}
        for number, edit in enumerate(task.edits):
            begun = time.perf_counter()
            if rows.wrong([number], layer.logits)[0]:
                training.fit(*rows.of(number), task.generator("memory", edit.request.id))
                fitted = not rows.wrong([number], layer.logits)[0]
                trained[number] = Trained(fitted, time.perf_counter() - begun)
            task.report("training", number + 1, len(task.edits))
        found = rows.wrong(range(len(task.edits)), layer.logits)
        if isinstance(layer, FinalLayer):
            rows.listen(found, layer.added)
        outcomes = [
            rows.outcome(number, wrong, trained.get(number), {PART: ()}, GROUP) for number, wrong in enumerate(found)
        ]
        return Product({PART: DenseDelta(layer.name, layer.delta.cpu())} if trained else {}, outcomes)


def _site(task: Task, config: ConstrainedConfig) -> FFNSite:
    sites = find_ffn_sites(task.model)
    if config.layer is None:
        site = task.site
    elif -len(sites) <= config.layer < len(sites):
        site = sites[config.layer]
    else:
        raise FormatError(
            f"method 'ft-l', setting layer: expected {-len(sites)} to {len(sites) - 1}, the model has {len(sites)} FFNs; found {config.layer}"
        )
    if site.kind == "experts":
        raise MismatchError(
            f"FFN {site.name!r} is a mixture of experts and has no down-projection of its own; use method 't-patcher' or 'mpn'"
        )
    return site


register(ConstrainedFineTuneEditor())
