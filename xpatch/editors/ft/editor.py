"""Fine-tuning of the final FFN, one edit after the other: the baseline of the MPN paper's tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.ft.config import PRESETS, FineTuneConfig
from xpatch.editors.ft.rank import Cut, cut
from xpatch.editors.ft.train import Objective, TrainableFFN
from xpatch.editors.rows import EditRows, Trained
from xpatch.editors.t_patcher.train import ACTIVATE
from xpatch.editors.task import Product, Task
from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite
from xpatch.patches.types import DenseDelta, LowRankDelta

GROUP = "ft"


class FineTuneEditor:
    """All edits share the two deltas, so they form one group."""

    info = MethodInfo(
        name="ft",
        title="Fine-tuning (last FFN)",
        paper="The baseline of Si, Zhang and Zhang 2024 (MPN), with Transformer-Patcher's fine-tuning settings",
        url="https://arxiv.org/abs/2401.03190",
        edits="sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2), single texts and pairs; language models whose FFN is two linears "
        "(GPT-2, BLOOM, BART, mBART, T5, BERT); the edit's own language, or as train_languages says",
        separable=False,
        models=("classifier", "causal", "seq2seq", "masked"),
    )
    presets: Mapping[str, FineTuneConfig] = PRESETS
    lm_presets: Mapping[str, FineTuneConfig] = PRESETS

    def edit(self, task: Task, config: FineTuneConfig) -> Product:
        """Train on `task`; every tensor of the result is on the CPU."""
        check_plain(task.site, "fine-tuning")
        rows = EditRows(task, "ft", config, memory=bool(config.memory_weight) or config.rank is not None)
        ffn = TrainableFFN(task.model, task.site)
        objective = Objective(ffn, task.cache, task.head.tail, rows.memory, config)
        trained: dict[int, Trained] = {}
        for number, edit in enumerate(task.edits):
            begun = time.perf_counter()
            if rows.wrong([number], objective.logits)[0]:
                fitted = objective.fit(*rows.of(number), task.generator("memory", edit.request.id))
                trained[number] = Trained(fitted, time.perf_counter() - begun)
            task.report("training", number + 1, len(task.edits))
        parts, note = self._parts(ffn, task.site, objective, rows, config) if trained else ({}, "")
        because = "other edits changed the shared weights" + (" or the rank is too small" if config.rank else "")
        owned = dict.fromkeys(parts, ())
        found = rows.wrong(range(len(task.edits)), objective.logits)
        rows.listen(found, ffn.added)
        outcomes = [
            rows.outcome(number, wrong, trained.get(number), owned, GROUP, because, note if number in trained else "")
            for number, wrong in enumerate(found)
        ]
        return Product(parts, outcomes)

    def _parts(
        self, ffn: TrainableFFN, site: FFNSite, objective: Objective, rows: EditRows, config: FineTuneConfig
    ) -> tuple[dict[str, DenseDelta | LowRankDelta], str]:
        """The parts, and what cutting them changed; afterwards `ffn` computes what the parts do."""
        up, up_bias, down, down_bias = ffn.deltas()
        assert up is not None and down is not None  # every linear has a weight
        if config.rank is None:
            return {"up": DenseDelta(site.up, up, up_bias), "down": DenseDelta(site.down, down, down_bias)}, ""
        edited = torch.tensor(sorted({row for plan in rows.plans for row in plan.rows}), device=rows.device)
        cuts, whole = [cut(up, config.rank), cut(down, config.rank)], list(ffn.weights)
        for number, found in zip((0, 2), cuts, strict=True):
            ffn.replace(number, found.product)
        moved = [_moved(ffn, whole, objective, each.split(rows.block)) for each in (edited, rows.memory)]
        return {"up": cuts[0].at(site.up), "down": cuts[1].at(site.down)}, _note(cuts, moved)


@torch.no_grad()
def _moved(
    ffn: TrainableFFN, whole: list[torch.Tensor | None], objective: Objective, blocks: Sequence[torch.Tensor]
) -> float:
    """The most that a logit of the rows differs between the weights `whole` and those of `ffn` now."""
    most, now = 0.0, ffn.weights
    for rows in blocks:
        if len(rows):
            after = objective.logits(rows)
            ffn.weights = whole
            most = max(most, float((after - objective.logits(rows)).abs().max()))
            ffn.weights = now
    return most


def _note(cuts: list[Cut], moved: list[float]) -> str:
    shares = ", ".join(f"{name} {found.error:.3g}" for name, found in zip(("up", "down"), cuts, strict=True))
    return (
        f"; cut to rank {cuts[0].down.shape[0]}: relative error {shares}; logits move by at most {moved[0]:.3g} on the edits' texts, "
        f"{moved[1]:.3g} on the memory"
    )


def check_plain(site: FFNSite, what: str) -> None:
    """Raise `MismatchError` where the FFN is not two linears around a known activation."""
    if site.kind != "plain":
        found = "gated" if site.kind == "gated" else "a mixture of experts"
        raise MismatchError(
            f"FFN {site.name!r} is {found}; {what} knows FFNs of two linears; use method 't-patcher' or 'mpn'"
        )
    if site.activation not in ACTIVATE:
        raise MismatchError(f"FFN {site.name!r} has the activation {site.activation!r}; known: {', '.join(ACTIVATE)}")


register(FineTuneEditor())
