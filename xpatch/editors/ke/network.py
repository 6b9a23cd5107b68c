"""KnowledgeEditor's network (section 4): the condition's encoding decides how the gradient of each matrix is scaled and shifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from xpatch.editors.hyper.capture import Signals
from xpatch.editors.hyper.lowrank import Factors
from xpatch.editors.hyper.network import Blueprint, Condition, HyperNetwork
from xpatch.editors.hyper.sites import EditedLinear


class Conditioner(nn.Module):
    """Tokens -> h `[E, H]`: the base's embeddings, a bidirectional LSTM (its last states), linear, tanh.

    embeddings `[V, D]`: a copy of the base's, trained where `trained`, else taken from the base again when the editor is loaded.
    """

    def __init__(self, embeddings: torch.Tensor, hidden: int, condition: int, trained: bool) -> None:
        super().__init__()
        table = embeddings.detach().clone()
        if trained:
            self.embeddings = nn.Parameter(table)
        else:
            self.register_buffer("embeddings", table, persistent=False)
        self.lstm = nn.LSTM(table.shape[1], hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, condition)

    def forward(self, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """input_ids and attention_mask `[E, T]`, padded on either side -> `[E, H]`."""
        ids = tokens["input_ids"]
        mask = tokens["attention_mask"].bool() if "attention_mask" in tokens else torch.ones_like(ids, dtype=torch.bool)
        first = torch.argsort(mask.int(), dim=1, descending=True, stable=True)  # tokens first, padding last
        vectors = nn.functional.embedding(ids.gather(1, first), self.embeddings)
        lengths = mask.sum(1).clamp_min(1).cpu()
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return torch.tanh(self.out(torch.cat((last[0], last[1]), -1)))


class Head(nn.Module):
    """h `[E, H]` -> c_a `[E, D_in]`, r_a `[E, D_out]`, c_b `[E, D_in]`, r_b `[E, D_out]`, s `[E]` of one matrix."""

    def __init__(self, linear: EditedLinear, condition: int, hidden: int) -> None:
        super().__init__()
        self.sizes = [linear.inside, linear.outside, linear.inside, linear.outside, 1]
        self.first = weight_norm(nn.Linear(condition, hidden))
        self.second = weight_norm(nn.Linear(hidden, sum(self.sizes)))

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The five, with the softmax and the sigmoid taken."""
        c_a, r_a, c_b, r_b, s = self.second(torch.tanh(self.first(h))).split(self.sizes, -1)
        return c_a, r_a.softmax(-1), c_b, r_b.softmax(-1), s.sigmoid().squeeze(-1)


class KnowledgeEditor(HyperNetwork):
    """`ΔW = max_scale σ(s) [G ∘ (r_a c_aᵀ) + r_b c_bᵀ]`, added (eq. 7-9, r after its softmax).

    With `G = Σ_t delta_t x_tᵀ` this is exactly `Σ_t (delta_t ∘ r_a)(x_t ∘ c_a)ᵀ + r_b c_bᵀ`, of rank at most T + 1.
    """

    def __init__(self, linears: Sequence[EditedLinear], embeddings: torch.Tensor, settings: Any, seed: int = 0) -> None:
        super().__init__()
        self.linears = tuple(linears)
        self.max_scale = float(settings.max_scale)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conditioner = Conditioner(embeddings, settings.hidden, settings.condition, settings.train_embeddings)
            self.heads = nn.ModuleList(Head(item, settings.condition, settings.hidden) for item in self.linears)

    def forward(self, signals: Mapping[str, Signals], condition: Condition) -> dict[str, Factors]:
        """Linear name -> factors; the last row of each edit is the shift r_b c_bᵀ."""
        h = self.conditioner(condition.tokens)
        edits = torch.arange(len(h), device=h.device)
        found = {}
        for item, head in zip(self.linears, self.heads, strict=True):
            seen = signals[item.name]
            c_a, r_a, c_b, r_b, s = head(h)
            scale = (self.max_scale * s).unsqueeze(-1)
            down = torch.cat((seen.x * c_a[seen.owner], c_b))
            up = torch.cat((seen.delta * (scale * r_a)[seen.owner], scale * r_b))
            found[item.name] = Factors(down, up, torch.cat((seen.owner, edits)))
        return found


def build(plan: Blueprint) -> KnowledgeEditor:
    """A fresh network for the linears of `plan`, with the base's embeddings."""
    assert plan.embeddings is not None  # the blueprint of this method always has them
    return KnowledgeEditor(plan.linears, plan.embeddings, plan.settings, plan.seed)
