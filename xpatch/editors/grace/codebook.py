"""The codebook: keys, radii and values, and how it takes up one row more (algorithm 1 of the paper)."""

from __future__ import annotations

from collections.abc import Callable

import torch

Limit = Callable[[torch.Tensor, int], float]
"""(key `[D]`, its label) -> the largest radius it may have."""
_APART = 1e-5  # between two balls that met, as in the reference


class Codebook:
    """keys `[K, D]`, radii `[K]`, values `[K, D]`; labels `[K]`: what each value answers; users `[K]`: (edit, row) that rely on the key."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.keys = torch.zeros(0, width, device=device)
        self.radii = torch.zeros(0, device=device)
        self.values = torch.zeros(0, width, device=device)
        self.labels: list[int] = []
        self.users: list[list[tuple[int, int]]] = []

    def __len__(self) -> int:
        return len(self.labels)

    def look(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x `[M, D]` -> the nearest key `[M]` and whether it is near enough `[M]` (equation 1)."""
        if not len(self):
            return torch.zeros(len(x), dtype=torch.long, device=x.device), torch.zeros(
                len(x), dtype=torch.bool, device=x.device
            )
        distance, nearest = torch.cdist(x, self.keys, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        return nearest, distance <= self.radii[nearest]

    def take(self, x: torch.Tensor, label: int, user: tuple[int, int], limit: Limit, new: float) -> tuple[int, bool]:
        """Make x `[D]` belong to a key of `label`; `new`: the radius of a key nothing is near to. Which key, and whether it is new."""
        room = limit(x, label)
        radius = min(new, room)
        if not len(self):
            return self._add(x, radius, label, user), True
        distance = torch.linalg.vector_norm(self.keys - x, dim=-1)
        gap, near = float(distance.min()), int(distance.argmin())
        if gap > radius + float(self.radii[near]):
            return self._add(x, radius, label, user), True
        if label != self.labels[near] and gap > 0:  # split: both balls end halfway
            self.radii[near] = min(gap / 2 - _APART, limit(self.keys[near], self.labels[near]))
            return self._add(x, min(gap / 2, room), label, user), True
        if label == self.labels[near] and gap > float(self.radii[near]):  # expand
            if gap > limit(self.keys[near], label):
                return self._add(x, radius, label, user), True
            self.radii[near] = gap * (1 + 1e-6)  # rounding must not leave x outside
        self.labels[near] = label
        self.users[near].append(user)
        return near, False

    def _add(self, key: torch.Tensor, radius: float, label: int, user: tuple[int, int]) -> int:
        self.keys = torch.cat((self.keys, key[None]))
        self.radii = torch.cat((self.radii, self.radii.new_tensor([radius])))
        self.values = torch.cat((self.values, torch.zeros_like(key)[None]))
        self.labels.append(label)
        self.users.append([user])
        return len(self) - 1
