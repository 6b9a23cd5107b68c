"""A codebook as patch neurons and gates that add `values[k]`, and nothing else, to each row that belongs to key k.

A gate lets a row through but does not say by which key. So each key has two ReLU neurons, `relu(z) - relu(z - 1)` times its value, where z grows
along a direction: at least 1 in the key's own ball and at most 0 in every other ball behind the same gate. The sum is then exactly the
value in the ball and exactly 0 in the others; outside all balls the gate is shut. Keys whose balls no direction tells apart go behind
different gates. A gate also holds, with a radius no row is within, each foreign key that may be nearer to a row of its balls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SHUT = -1.0  # a radius no distance is within


@dataclass(frozen=True)
class Group:
    """keys `[2G, D]`, bias `[2G]`, values `[2G, D]` of ReLU neurons, two for each of `members` (codebook indices `[G]`), and their gate."""

    members: tuple[int, ...]
    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    gate_keys: torch.Tensor
    gate_radii: torch.Tensor


def encode(keys: torch.Tensor, radii: torch.Tensor, values: torch.Tensor) -> list[Group]:
    """keys `[K, D]`, radii `[K]`, values `[K, D]` -> as few groups as a greedy choice finds. Keys with a negative radius answer nothing."""
    exact, reach = keys.double(), radii.double()
    directions = _directions(exact, reach)
    margin = _margin(directions, exact, reach)
    apart = margin > _least(exact, reach)[:, None]
    apart = apart & apart.T
    between = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
    groups: list[list[int]] = []
    for key in torch.nonzero(reach >= 0).flatten().tolist():
        home = next((group for group in groups if bool(apart[key, group].all())), None)
        if home is None:
            groups.append([key])
        else:
            home.append(key)
    return [_group(group, exact, reach, values, directions, margin, between) for group in groups]


def _group(
    members: list[int],
    keys: torch.Tensor,
    radii: torch.Tensor,
    values: torch.Tensor,
    directions: torch.Tensor,
    margin: torch.Tensor,
    between: torch.Tensor,
) -> Group:
    index = torch.tensor(members, device=keys.device)
    own = margin[index][:, index].clone()
    own.fill_diagonal_(float("inf"))
    # z rises from 0 to 1 in the middle half of the free space before the ball; a gentle rise keeps the difference exact.
    free = torch.minimum(own.min(1).values, torch.maximum(2 * radii[index], _least(keys, radii)[index]))
    edge = (keys[index] * directions[index]).sum(-1) - radii[index]
    slope = 2 / free
    first = directions[index] * slope[:, None]
    bias = 1 - (edge - free / 4) * slope
    foreign = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    foreign[index] = False
    # A foreign key can be nearer to a row of ball i only where it is closer to key i than the ball's diameter.
    nearer = foreign & (between[index] <= 2 * radii[index][:, None] * (1 + 1e-6)).any(0)
    pairs = torch.stack((values[index], -values[index]), 1).flatten(0, 1)
    return Group(
        tuple(members),
        first.repeat_interleave(2, 0).to(values),
        torch.stack((bias, bias - 1), 1).flatten().to(values),
        pairs,
        torch.cat((keys[index], keys[nearer])).to(values),
        torch.cat((radii[index], torch.full_like(radii[nearer], _SHUT))).to(values),
    )


def _directions(keys: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """A unit direction `[K, D]` per key along which its ball lies beyond most others: from the mean, plainly or with the keys' spread undone."""
    centred = keys - keys.mean(0) if len(keys) > 1 else torch.ones_like(keys)
    spread = centred.T @ centred / len(keys)
    eye = torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device) * spread.diagonal().mean().clamp_min(1e-12)
    tried = [centred, *(torch.linalg.solve(spread + share * eye, centred.T).T for share in (1.0, 0.1, 0.01))]
    best, score = torch.zeros_like(keys), torch.full((len(keys),), -1, device=keys.device)
    for found in tried:
        unit = found / torch.linalg.vector_norm(found, dim=-1, keepdim=True).clamp_min(1e-300)
        apart = (_margin(unit, keys, radii) > _least(keys, radii)[:, None]).sum(1)
        best, score = torch.where((apart > score)[:, None], unit, best), torch.maximum(apart, score)
    return best


def _margin(directions: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """`[K, K]`: how far ball i lies beyond ball j along the direction of i."""
    along = directions @ keys.T
    return along.diagonal()[:, None] - along - radii[:, None] - radii.clamp_min(0)


def _least(keys: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """The free space `[K]` a rise needs, so that rounding in fp32 cannot cross it."""
    return torch.maximum(0.02 * radii, 1e-4 * torch.linalg.vector_norm(keys, dim=-1)).clamp_min(1e-6)
