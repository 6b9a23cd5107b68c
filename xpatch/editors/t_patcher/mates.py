"""Which rows of other edits must stay silent while a chunk trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_BLOCK = 16384


@dataclass(frozen=True)
class Mates:
    """rows `[M']` of the cache and foreign `[E, M']`: true where a row must stay silent for an edit. crowd `[M'']`: rows of earlier
    edits that must stay silent for all, to be drawn from in each step."""

    rows: torch.Tensor
    foreign: torch.Tensor
    crowd: torch.Tensor


def mates(
    shared: torch.Tensor, own: Sequence[Sequence[int]], negatives: Sequence[Sequence[int]], x: torch.Tensor, limit: int
) -> Mates:
    """For `E` edits of rows `own` and locality probes `negatives`. shared `[M]`: rows of the cache that belong to accepted edits.

    Rows of accepted edits are memory for each other, an edit's locality probes for it alone; a text that two edits share is
    nobody's foreign row. limit: where the accepted edits have more rows than this beside the chunk's (0: no limit), the nearest
    stay and the others become the crowd. x `[M, D]`.
    """
    device = shared.device
    edits = torch.arange(len(own), device=device)
    mine, spared = _index(own, device), _index(negatives, device)
    chosen, crowd = shared.clone(), shared.new_zeros(0, dtype=torch.long)
    others = shared.clone()
    others[mine] = False
    others[spared] = False
    beside = others.nonzero().flatten()
    if limit and len(beside) > limit:
        first = x[torch.tensor([rows[0] for rows in own], device=device)]
        near = nearest(first, x, beside, max(1, limit // 2 // len(own)))
        others[near] = False
        chosen &= ~others
        crowd = others.nonzero().flatten()
    chosen[spared] = True
    rows = chosen.nonzero().flatten()
    place = torch.full_like(shared, -1, dtype=torch.long)
    place[rows] = torch.arange(len(rows), device=device)
    foreign = shared[rows].expand(len(own), len(rows)).clone()
    foreign[_repeat(edits, negatives), place[spared]] = True
    held = place[mine] >= 0
    foreign[_repeat(edits, own)[held], place[mine][held]] = False
    return Mates(rows, foreign, crowd)


def nearest(towards: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` of `rows` with the largest dot product with each of `towards` `[E, D]`, as one sorted set of rows."""
    best = torch.empty(len(towards), 0, device=x.device)
    found = torch.empty(len(towards), 0, dtype=torch.long, device=x.device)
    for part in rows.split(_BLOCK):
        best = torch.cat((best, towards @ x[part].T), dim=1)
        found = torch.cat((found, part.expand(len(towards), -1)), dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        found = found.gather(1, order)
    return torch.unique(found)


def _index(groups: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor([row for rows in groups for row in rows], dtype=torch.long, device=device)


def _repeat(edits: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    return edits.repeat_interleave(torch.tensor([len(rows) for rows in groups], device=edits.device))
