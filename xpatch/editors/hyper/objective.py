"""One pass of the training objective (MEND's, section 3.3): `w_e NLL(outer | edited) + w_l KL(base || edited on other texts)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from xpatch.editors.hyper.capture import capture
from xpatch.editors.hyper.lowrank import side_path
from xpatch.editors.hyper.network import Condition, HyperNetwork
from xpatch.editors.hyper.sampling import Draw
from xpatch.editors.hyper.sites import EditedLinear
from xpatch.editors.hyper.texts import Encoder
from xpatch.patches.requests import Probe


@dataclass(frozen=True, eq=False)
class Answers:
    """Of E edits: nll `[E]` and kl `[E]` (differentiable), right `[E]` and kept `[E, K]` (argmax as wanted, argmax as before), flips `[E]`
    (another label than the base's was asked for)."""

    nll: torch.Tensor
    kl: torch.Tensor
    right: torch.Tensor
    kept: torch.Tensor
    flips: torch.Tensor


class Trial:
    """The base with one hyper-network: edits are tried out, each on the base alone."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: Encoder,
        linears: Sequence[EditedLinear],
        labels: Sequence[str],
        condition_text: str = "input",
        precision: str = "fp32",
    ) -> None:
        self.model, self.encoder, self.linears, self._labels = model, encoder, tuple(linears), tuple(labels)
        self._condition_text, self._half = condition_text, precision == "bf16"

    def autocast(self) -> Any:
        """Autocast of the base's passes."""
        return torch.autocast(self.encoder.device.type, torch.bfloat16, enabled=self._half)

    def signals(self, probes: Sequence[Probe], wanted: Any) -> Any:
        """`capture` for these edit inputs."""
        return capture(self.model, self.encoder(probes), wanted, self.linears, self.autocast if self._half else None)

    def condition(
        self,
        probes: Sequence[Probe],
        languages: Sequence[str],
        before: torch.Tensor,
        labels: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> Condition:
        """What the network is told: the input, or "{answer} >> {new answer} || {input}" (KnowledgeEditor, section 4)."""
        texts = list(probes)
        if self._condition_text == "change":
            texts = [
                Probe(text=f"{self._labels[old]} >> {self._labels[new]} || {probe.text}", text_pair=probe.text_pair)
                for probe, old, new in zip(probes, before.tolist(), labels.tolist(), strict=True)
            ]
        return Condition(self.encoder(texts), list(languages), generator)

    def __call__(
        self, network: HyperNetwork, draws: Sequence[Draw], generator: torch.Generator | None = None
    ) -> tuple[Answers, Condition]:
        """Edit each draw's input, and ask its outer text and its locality texts."""
        edits = len(draws)
        probes = [draw.inner for draw in draws]
        signals, labels, logits = self.signals(probes, lambda found: wanted_labels(found, draws))
        before = logits.argmax(-1)
        condition = self.condition(probes, [draw.language for draw in draws], before, labels, generator)
        factors = network(signals, condition)
        asked = [probe for draw in draws for probe in (draw.outer, *draw.locality)]
        kept = [probe for draw in draws for probe in draw.locality]
        with torch.no_grad(), self.autocast():
            base = self.model(**self.encoder(kept)).logits.float().view(edits, -1, logits.shape[-1])
        with side_path(self.model, factors, edits), self.autocast():
            edited = self.model(**self.encoder(asked)).logits
        edited = edited.float().view(edits, -1, logits.shape[-1])
        nll = F.cross_entropy(edited[:, 0], labels, reduction="none")
        old, new = base.log_softmax(-1), edited[:, 1:].log_softmax(-1)
        kl = (old.exp() * (old - new)).sum(-1).mean(1)
        right = edited[:, 0].detach().argmax(-1) == labels
        same = edited[:, 1:].detach().argmax(-1) == base.argmax(-1)
        return Answers(nll, kl, right, same, labels != before), condition


def wanted_labels(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The label of each draw `[E]`, from the base's answer where the draw names none."""
    classes = logits.shape[-1]
    found = []
    for draw, answer in zip(draws, logits.argmax(-1).tolist(), strict=True):
        if draw.label is not None:
            found.append(draw.label)
        elif draw.flip is None:
            found.append(answer)
        else:
            found.append((answer + 1 + int(draw.flip * (classes - 1))) % classes)
    return torch.tensor(found, device=logits.device)
