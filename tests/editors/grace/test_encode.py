"""The parts a codebook becomes add the value of the nearest key, where it is near enough, and nothing else."""

from __future__ import annotations

import pytest
import torch

from xpatch.editors.grace.encode import Group, encode
from xpatch.ops import ball, patch_ffn, reference


def wanted(x: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What the paper's equation 1 adds, in fp64."""
    distance, nearest = torch.cdist(x.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist").min(-1)
    return torch.where((distance <= radii.double()[nearest])[:, None], values[nearest], 0)


def added(x: torch.Tensor, groups: list[Group], native: bool = False) -> torch.Tensor:
    gate, neurons = (ball, patch_ffn) if native else (reference.ball, reference.patch_ffn)
    total = torch.zeros_like(x)
    for group in groups:
        found = neurons(x, group.keys, group.bias, group.values, "relu")
        total += torch.where(gate(x, group.gate_keys, group.gate_radii)[:, None], found, 0)
    return total


def rows_near(keys: torch.Tensor, radii: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows in every ball, at its centre, just inside and just outside its edge, between keys, and far away."""
    found = [keys, torch.randn(50, keys.shape[1], generator=generator) * 3]
    for share in (0.3, 0.999, 1.001):
        step = torch.randn(len(keys), 8, keys.shape[1], generator=generator)
        step = step / step.norm(dim=-1, keepdim=True) * (radii.clamp_min(0) * share)[:, None, None]
        found.append((keys[:, None] + step).flatten(0, 1))
    for share in (0.1, 0.45, 0.55, 0.9):
        other = keys[torch.randperm(len(keys), generator=generator)]
        found.append(keys + share * (other - keys))
    return torch.cat(found)


def check(x: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor, values: torch.Tensor) -> list[Group]:
    groups = encode(keys, radii, values)
    distance = torch.cdist(x.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(-1).values
    on_edge = ((torch.cdist(x.double(), keys.double()) - radii).abs() < 1e-4).any(-1)
    if len(keys) > 1:
        on_edge |= distance[:, 1] - distance[:, 0] < 1e-4  # as near to two keys: rounding decides
    x = x[~on_edge]
    expected = wanted(x, keys, radii, values)
    for native in (False, True):
        found = added(x, groups, native)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert not found[~expected.any(-1)].any()  # exactly nothing outside
    assert sorted(key for group in groups for key in group.members) == torch.nonzero(radii >= 0).flatten().tolist()
    return groups


@pytest.mark.parametrize("width", [2, 16, 64])
@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("reach", [0.01, 0.5, 3.0])
def test_any_codebook(width: int, count: int, reach: float) -> None:
    """Among them balls within balls and many more keys than coordinates."""
    generator = torch.Generator().manual_seed(width * count)
    keys = torch.randn(count, width, generator=generator)
    radii = torch.rand(count, generator=generator) * reach
    values = torch.randn(count, width, generator=generator) * 5
    check(rows_near(keys, radii, generator), keys, radii, values)


def test_balls_far_apart_share_one_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(40, 64, generator=generator) + 3
    radii = torch.full((40,), 2.0)
    assert len(check(rows_near(keys, radii, generator), keys, radii, torch.randn(40, 64, generator=generator))) == 1


def test_overlapping_balls_stand_behind_different_gates() -> None:
    keys, radii = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 0.8, 0.4])
    generator = torch.Generator().manual_seed(0)
    groups = check(rows_near(keys, radii, generator), keys, radii, torch.randn(3, 2, generator=generator))
    assert len(groups) >= 2


def test_a_key_shut_for_good_still_keeps_rows_from_its_neighbour() -> None:
    keys, radii = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([2.0, -1e-5])
    groups = check(torch.tensor([[0.9, 0.0], [0.1, 0.0], [-1.5, 0.0]]), keys, radii, torch.ones(2, 2))
    assert [group.members for group in groups] == [(0,)] and len(groups[0].gate_keys) == 2


def test_one_key_answers_exactly_its_value_at_its_own_row() -> None:
    value = torch.randn(1, 8)
    (group,) = encode(torch.randn(1, 8), torch.tensor([1.0]), value)
    torch.testing.assert_close(added(group.gate_keys, [group]), value)
