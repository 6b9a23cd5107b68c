"""Patch sets of every form for the tiny models, and the same maths written out plainly beside a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from xpatch import DenseDelta, Gate, LanguageMask, LowRankDelta, PatchNeurons, PatchSet
from xpatch.models.anatomy import final_ffn, find_ffn_sites, linear

FORMS = ("neurons", "lowrank", "dense", "dense-no-bias")


def make_set(
    model: nn.Module, form: str, *, seed: int = 0, layer: int = -1, mask: bool = False, gate: str | None = None
) -> PatchSet:
    """One part of `form` at the FFN of `layer`: neurons beside it, deltas beside its down projection."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    site = find_ffn_sites(model)[layer]
    inside = site.width if form == "neurons" else site.inner
    names: dict[str, Any] = {"mask": "lang" if mask else None, "gate": "g" if gate else None}
    if form == "neurons":
        part: Any = PatchNeurons(site.name, random(5, site.width), random(5), random(5, site.width), "relu", **names)
    elif form == "lowrank":
        part = LowRankDelta(site.down, random(3, site.inner), random(site.width, 3), **names)
    else:
        bias = random(site.width) if form == "dense" else None
        part = DenseDelta(site.down, random(site.width, site.inner), bias, **names)
    masks = {"lang": LanguageMask(("en", "de"), random(2, inside), random(2, site.width))} if mask else {}
    gates = {}
    if gate is not None:  # open for about half of the rows
        x = _inputs(model, site.up if form == "neurons" else site.down)
        if gate == "ball":
            keys = random(2, inside)
            middle = torch.cdist(x, keys).min(dim=1).values.median()
            gates = {"g": Gate("ball", keys=keys, radii=torch.stack([middle, middle * 1.001]))}
        else:
            gates = {"g": Gate("threshold", threshold=float(_plain(part, x).norm(dim=-1).median()) * 1.0001)}
    return PatchSet(parts={"part": part}, masks=masks, gates=gates)


def _inputs(model: nn.Module, name: str) -> torch.Tensor:
    """What reaches the linear layer `name` on the tokens of the fixture `token_ids`, `[21, D_in]` in fp32."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(1)))
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).float()


def _plain(part: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, PatchNeurons):
        return torch.relu(x @ part.keys.t() + part.bias) @ part.values
    if isinstance(part, LowRankDelta):
        return x @ part.down.t() @ part.up.t()
    return x @ part.weight.t() + (0 if part.bias is None else part.bias)


class SidePath(nn.Module):
    """`linear(x) + patch(x)`, written out row by row in float64; for neurons x comes from the up projection."""

    def __init__(
        self, inner: nn.Module, patches: PatchSet, languages: list[str] | None, source: list[torch.Tensor] | None
    ) -> None:
        super().__init__()
        self.inner, self.patches, self.languages, self.source = inner, patches, languages, source

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        y = self.inner(hidden)
        x = hidden if self.source is None else self.source.pop()
        flat, out = x.reshape(-1, x.shape[-1]), []
        for row, vector in enumerate(flat):
            language = None if self.languages is None else self.languages[row * len(self.languages) // len(flat)]
            out.append(self._row(vector, language))
        return y + torch.stack(out).reshape(y.shape)

    def _row(self, x: torch.Tensor, language: str | None) -> torch.Tensor:
        part, raw = self.patches.parts["part"], x
        mask = self.patches.masks.get(part.mask) if part.mask and language in ("en", "de") else None
        which = ("en", "de").index(language) if mask is not None and language else 0
        if mask is not None:
            x = x * mask.inner[which].double()
        if isinstance(part, PatchNeurons):
            delta = sum(
                torch.relu(x @ key.double() + bias.double()) * value.double()
                for key, bias, value in zip(part.keys, part.bias, part.values, strict=True)
            )
        elif isinstance(part, LowRankDelta):
            delta = part.up.double() @ (part.down.double() @ x)
        else:
            delta = part.weight.double() @ x + (0 if part.bias is None else part.bias.double())
        if mask is not None:
            delta = delta * mask.outer[which].double()
        if part.gate is None:
            return delta
        gate = self.patches.gates[part.gate]
        if gate.kind == "threshold":
            opened = bool((delta**2).sum().sqrt() >= gate.threshold)
        else:
            distances = [((raw - key.double()) ** 2).sum().sqrt() for key in gate.keys]
            nearest = min(range(len(distances)), key=lambda index: float(distances[index]))
            opened = bool(distances[nearest] <= gate.radii[nearest])
        self.opened = [*getattr(self, "opened", []), opened]
        return delta if opened else torch.zeros_like(delta)


def written_out(model: nn.Module, patches: PatchSet, languages: list[str] | None = None) -> nn.Module:
    """A float64 copy of `model` whose patched layer is replaced by a `SidePath`."""
    twin = copy.deepcopy(model).double()
    part = patches.parts["part"]
    source: list[torch.Tensor] | None = None
    name = part.site
    if isinstance(part, PatchNeurons):
        site = next(site for site in find_ffn_sites(twin) if site.name == part.site)
        source, name = [], site.down
        twin.get_submodule(site.up).register_forward_pre_hook(lambda module, args: source.append(args[0]))  # type: ignore[union-attr]
    inner, _, _ = linear(twin, name)
    parent, _, last = name.rpartition(".")
    setattr(twin.get_submodule(parent), last, SidePath(inner, patches, languages, source))
    return twin


@pytest.fixture
def patch_of() -> Callable[..., PatchSet]:
    return make_set


@pytest.fixture
def by_hand() -> Callable[..., nn.Module]:
    return written_out


@pytest.fixture
def last_site() -> Callable[[nn.Module], Any]:
    return final_ffn
