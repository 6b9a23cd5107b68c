"""Language masks with an L0 penalty (Louizos et al. 2018): per matrix and language, over the gradient's two factors.

A mask is `1 + e z` with a hard-concrete z in [0, 1]: it amplifies coordinates and never removes one. Masks belong to the editor;
nothing of a language remains in the patch it makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from xpatch.editors.hyper.capture import Signals
from xpatch.editors.hyper.lowrank import Factors
from xpatch.editors.hyper.network import Condition, HyperNetwork
from xpatch.editors.hyper.sites import EditedLinear
from xpatch.errors import MismatchError

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # temperature and stretch of the hard concrete distribution
SMALLEST, LARGEST = math.log(0.01), math.log(100)  # range of log alpha


class HardConcreteMasks(nn.Module):
    """One mask over `width` coordinates for each of `rows` languages: `1 + scale · z`."""

    def __init__(self, rows: int, width: int, generator: torch.Generator, offset: float = 1.0) -> None:
        super().__init__()
        self.offset = offset
        self.scale = nn.Parameter(torch.ones(rows, width))  # e
        self.log_alpha = nn.Parameter(torch.randn(rows, width, generator=generator) * 0.01)

    def forward(self, row: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """row `[M]` -> masks `[M, D]`; in training mode with fresh noise for every row and coordinate."""
        z = self.log_alpha[row]
        if self.training:
            u = torch.rand(z.shape, generator=generator, dtype=z.dtype).clamp_(1e-6, 1 - 1e-6).to(z.device)
            z = ((u / (1 - u)).log() + z) / BETA
        z = (z.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
        return self.offset + self.scale[row] * z

    def open_share(self, row: torch.Tensor) -> torch.Tensor:
        """Mean P(z ≠ 0) over the rows given, the differentiable L0: `σ(log α - β ln(-low / high))`."""
        return (self.log_alpha[row] - BETA * math.log(-LOW / HIGH)).sigmoid().mean()

    def constrain(self) -> None:
        with torch.no_grad():
            self.log_alpha.clamp_(SMALLEST, LARGEST)


class Masked(HyperNetwork):
    """An editor behind language masks: x and delta are masked first, by the language of the edit's input.

    languages: in the order of the masks' rows; stored by name with the editor, never taken from the order of a set.
    per_token: noise per token row (LiME-MEND masks the factors); else one draw per edit (LiME-KE masks the gradient as a whole).
    """

    def __init__(
        self,
        inner: HyperNetwork,
        linears: Sequence[EditedLinear],
        languages: Sequence[str],
        per_token: bool,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.editor, self.linears, self.languages = inner, tuple(linears), tuple(languages)
        self.per_token = per_token
        rows = len(self.languages)
        self.inner = nn.ModuleList(HardConcreteMasks(rows, item.inside, generator) for item in self.linears)
        self.outer = nn.ModuleList(HardConcreteMasks(rows, item.outside, generator) for item in self.linears)

    def forward(self, signals: Mapping[str, Signals], condition: Condition) -> dict[str, Factors]:
        """The editor's factors for the masked signals."""
        language = self._rows(condition.languages)
        masked = {}
        for item, inner, outer in zip(self.linears, self.inner, self.outer, strict=True):
            seen = signals[item.name]
            if self.per_token:
                row = language.to(seen.owner.device)[seen.owner]
                m_in, m_out = inner(row, condition.generator), outer(row, condition.generator)
            else:
                row = language.to(seen.owner.device)
                m_in = inner(row, condition.generator)[seen.owner]
                m_out = outer(row, condition.generator)[seen.owner]
            masked[item.name] = Signals(seen.x * m_in, seen.delta * m_out, seen.owner)
        return self.editor(masked, condition)

    def penalty(self, condition: Condition) -> torch.Tensor:
        """L0 averaged over coordinates, the rows in use and all masks."""
        row = self._rows(condition.languages)
        masks = [*self.inner, *self.outer]
        return torch.stack([mask.open_share(row.to(mask.log_alpha.device)) for mask in masks]).mean()

    def constrain(self) -> None:
        for mask in (*self.inner, *self.outer):
            mask.constrain()

    def group_of(self, name: str) -> str:
        prefix, _, rest = name.partition(".")
        return self.editor.group_of(rest) if prefix == "editor" else "mask"

    def _rows(self, languages: Sequence[str]) -> torch.Tensor:
        unknown = [language for language in languages if language not in self.languages]
        if unknown:
            raise MismatchError(
                f"the editor has no mask for language {unknown[0]!r}; it was trained with masks for {', '.join(self.languages)}; "
                "edit in one of these, or train an editor with this language among its edit languages"
            )
        return torch.tensor([self.languages.index(language) for language in languages])
