"""Texts read once: answers without patches, and what enters the final FFN, from which patched answers follow.

Patches at the final FFN change nothing below it. Where all applied parts sit there, the answer to a text that has been read needs
the FFN and the head for one row instead of the model for all tokens; both run as they are, the patches' own hooks included.
Axes: `M` texts, `D` model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from xpatch.evaluation.predict import batches, predict_indices, spoken
from xpatch.models.features import capture
from xpatch.models.heads import head_of
from xpatch.ops.reference import ACTIVATIONS
from xpatch.patches.requests import Probe
from xpatch.runtime.attach import runtime_of
from xpatch.runtime.routing import switched_off

# Batches of other shapes round differently (1e-6); a text whose two best logits lie closer than this is asked in full.
CLOSE = 1e-3
BLOCK = 2048


class Readings:
    """What one classifier without patches made of every text asked so far, for `xpatch.evaluate(..., readings=...)`.

    Answers equal those of whole calls: texts whose best two logits lie within `CLOSE` (relative to the largest) are asked in full.
    (A text on the very edge of a gate's ball may fall to the other side, as it may in another batch.) The model's weights must not
    change meanwhile. Memory: two fp32 rows of width D a text, one where the residual is the FFN's input (BERT). Raises
    `MismatchError` for a model whose head is not known.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 256) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._head = head_of(model)
        self._rows: dict[tuple[str, str | None], int] = {}
        self._x = self._residual = torch.empty(0)
        self._answers = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def before(self, probes: Sequence[Probe]) -> np.ndarray:
        """The class of each probe without patches, int64 `[M]`; texts not read yet are read."""
        at = self._read(probes)
        return self._answers[at]

    def after(self, probes: Sequence[Probe], languages: Sequence[str] | None = None) -> np.ndarray:
        """The class of each probe with what is applied to the model now, int64 `[M]`.

        languages: of each probe, for sets with language masks.
        """
        if not self._reach():
            return predict_indices(self.model, self.tokenizer, probes, batch_size=self.batch_size, languages=languages)
        at = self._read(probes)
        found = np.empty(len(probes), dtype=np.int64)
        close = np.zeros(len(probes), dtype=bool)
        for start in range(0, len(probes), BLOCK):
            here = slice(start, start + BLOCK)
            logits = self._logits(at[here], None if languages is None else languages[here])
            best = logits.topk(2, dim=-1).values
            found[here] = logits.argmax(-1).numpy()
            close[here] = (best[:, 0] - best[:, 1] <= CLOSE * (1 + logits.abs().amax(-1))).numpy()
        again = np.flatnonzero(close).tolist()
        if again:
            asked = None if languages is None else [languages[i] for i in again]
            found[again] = predict_indices(
                self.model, self.tokenizer, [probes[i] for i in again], batch_size=self.batch_size, languages=asked
            )
        return found

    def _reach(self) -> bool:
        """Whether everything applied sits at the final FFN, and that FFN is two linears with a known activation between."""
        site, runtime = self._head.site, runtime_of(self.model)
        places = () if runtime is None else runtime.snapshot.points
        known = site.kind == "plain" and site.uses == 1 and site.activation in ACTIVATIONS
        return known and set(places) <= {site.name, site.up, site.down} and not self.model.training

    def _logits(self, at: np.ndarray, languages: Sequence[str] | None) -> torch.Tensor:
        """Final FFN and head on rows `at`, with the hooks that are on them: `[M, C]` on the CPU."""
        site, chosen = self._head.site, torch.from_numpy(at)
        x, residual = (kept[chosen].to(self.model.device).unsqueeze(1) for kept in (self._x, self._residual))
        with torch.no_grad(), spoken(languages):
            inner = ACTIVATIONS[site.activation](self.model.get_submodule(site.up)(x))
            output = self.model.get_submodule(site.down)(inner)
            logits: torch.Tensor = self._head.tail(output[:, 0], residual[:, 0])
        return logits.float().cpu()

    def _read(self, probes: Iterable[Probe]) -> np.ndarray:
        """Row numbers `[M]`; reads what is new."""
        before = len(self._rows)
        at: list[int] = []
        fresh: list[Probe] = []
        for probe in probes:
            key = (probe.text, probe.text_pair)
            row = self._rows.setdefault(key, len(self._rows))
            at.append(row)
            if row == before + len(fresh):
                fresh.append(probe)
        if fresh:
            try:
                self._append(fresh)
            except BaseException:
                for probe in fresh:  # so that a later call reads them
                    self._rows.pop((probe.text, probe.text_pair))
                raise
        return np.array(at, dtype=np.int64)

    def _append(self, fresh: Sequence[Probe]) -> None:
        answers = np.empty(len(fresh), dtype=np.int64)
        order: list[int] = []
        x: list[torch.Tensor] = []
        residual: list[torch.Tensor] = []
        shared = self._head.residual_from == self._head.site.up
        with switched_off(self.model):
            for positions, inputs in batches(self.model, self.tokenizer, fresh, batch_size=self.batch_size):
                features = capture(self.model, inputs, self._head.site)
                answers[positions] = features.logits.argmax(-1).cpu().numpy()
                order += positions.tolist()
                x.append(features.x.cpu())
                if not shared:
                    residual.append(features.residual.cpu())
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        self._answers = np.concatenate((self._answers, answers))
        self._x = _joined(self._x, torch.cat(x)[back])
        self._residual = self._x if shared else _joined(self._residual, torch.cat(residual)[back])


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat((first, second)) if first.numel() else second
