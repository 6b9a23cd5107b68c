"""The published state: every applied set, checked and prepared, as one immutable value that calls pin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite, ffn_site, find_ffn_sites, linear
from xpatch.ops import BoundPatchFfn, pack_balls, pack_keys
from xpatch.patches.types import Gate, Part, PatchNeurons, PatchSet
from xpatch.runtime.runs import DeltaRun, steps_of


@dataclass(frozen=True)
class Point:
    """A place where patches join: the module whose input they read and the module whose output they add to."""

    site: str
    reads: str
    adds: str


class Tensors:
    """A part's tensors, cast once per device and dtype. What is handed out is never written to.

    activation: of patch neurons, whose keys are also packed for screening (`packed`, where the native kernel can use them), for
    inputs like `rows` `[M, D]` where those are known. The keys of a ball gate are packed as `gate_packed`.
    """

    def __init__(
        self, masters: Mapping[str, torch.Tensor], activation: str | None = None, rows: torch.Tensor | None = None
    ) -> None:
        self._masters = dict(masters)
        self._activation = activation
        self._rows = rows
        self._cast: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
        self._bound: dict[tuple[torch.device, torch.dtype], BoundPatchFfn] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors for this device and dtype; two threads that meet here both cast and one result stays."""
        cast = self._cast.get((device, dtype))
        if cast is None:
            # A tensor made in inference mode could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                cast = {
                    name: tensor.detach().to(device=device, dtype=dtype).contiguous()
                    for name, tensor in self._masters.items()
                }
                packed = self._activation and pack_keys(cast["keys"], cast["bias"], self._activation, self._rows)
                if isinstance(packed, torch.Tensor):
                    cast["packed"] = packed
                balls = pack_balls(cast["gate_keys"], cast["gate_radii"]) if "gate_keys" in cast else None
                if balls is not None:
                    cast["gate_packed"] = balls
            self._cast[(device, dtype)] = cast
        return cast

    def neurons(self, device: torch.device, dtype: torch.dtype) -> BoundPatchFfn:
        """Patch neurons for this device and dtype, without masks, ready to be called."""
        bound = self._bound.get((device, dtype))
        if bound is None:
            cast, activation = self.on(device, dtype), self._activation
            assert activation is not None  # these are neurons
            bound = BoundPatchFfn(cast["keys"], cast["bias"], cast["values"], activation, cast.get("packed"))
            self._bound[(device, dtype)] = bound
        return bound

    def replaced(self, **masters: torch.Tensor) -> Tensors:
        """The same tensors but for these."""
        return Tensors({**self._masters, **masters}, self._activation, self._rows)

    def made(self) -> list[tuple[torch.device, torch.dtype]]:
        """For which devices and dtypes there are tensors already."""
        return list(self._cast)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cast": {}, "_bound": {}}


@dataclass(frozen=True, eq=False)
class PreparedPart:
    """One part of one applied set, ready to compute. `languages` of its mask, or None without one."""

    set_name: str
    name: str
    part: Part
    point: Point
    gate: Gate | None
    languages: tuple[str, ...] | None
    tensors: Tensors


@dataclass(frozen=True, eq=False)
class AppliedSet:
    """A named set with its prepared parts. expired: edits that were left out; `patches` is without them, `fingerprint` is not."""

    name: str
    patches: PatchSet
    fingerprint: str
    parts: tuple[PreparedPart, ...]
    expired: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that is applied to a model at one moment. at: site -> its parts, in the order the sets were applied; steps: site ->
    what is computed there, the same parts with deltas that go together joined."""

    version: int = 0
    sets: Mapping[str, AppliedSet] = field(default_factory=lambda: MappingProxyType({}))
    at: Mapping[str, tuple[PreparedPart, ...]] = field(default_factory=lambda: MappingProxyType({}))
    masked: tuple[str, ...] = ()
    steps: Mapping[str, tuple[PreparedPart | DeltaRun, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, sets: Mapping[str, AppliedSet], version: int) -> Snapshot:
        at: dict[str, tuple[PreparedPart, ...]] = {}
        for applied in sets.values():
            for part in applied.parts:
                at[part.point.site] = (*at.get(part.point.site, ()), part)
        masked = tuple(name for name, applied in sets.items() if any(part.languages for part in applied.parts))
        steps = {site: steps_of(parts) for site, parts in at.items()}
        return cls(version, MappingProxyType(dict(sets)), MappingProxyType(at), masked, MappingProxyType(steps))

    @property
    def points(self) -> dict[str, Point]:
        return {site: parts[0].point for site, parts in self.at.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        return self  # a copied model shares the value and publishes its own next one

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (dict(self.sets), self.version)


def _rebuild(sets: dict[str, AppliedSet], version: int) -> Snapshot:
    return Snapshot.of(sets, version)


EMPTY = Snapshot()


def prepare_set(
    model: nn.Module,
    patches: PatchSet,
    name: str,
    sites: Callable[[], list[FFNSite]] | None = None,
    typical: Mapping[str, torch.Tensor] | None = None,
) -> AppliedSet:
    """Check that every part has its site in `model` and cast its tensors for the layer it joins. Changes nothing.

    sites: gives the model's FFNs where they were found before. typical: site -> typical inputs `[M, D]`, where known. Raises `MismatchError` where a site is missing or has other widths.
    """
    needs_sites = any(isinstance(part, PatchNeurons) for part in patches.parts.values())
    found = (sites() if sites is not None else find_ffn_sites(model)) if needs_sites else []
    parts = tuple(_prepare_part(model, patches, name, key, found, typical or {}) for key in patches.parts)
    return AppliedSet(name, patches, patches.fingerprint, parts)


def point_at(model: nn.Module, name: str, sites: list[FFNSite]) -> tuple[Point, tuple[int, int]]:
    """Where patches named for the FFN (in `sites`) or the linear layer `name` join, and its (input, output) widths.

    Raises `MismatchError` listing what there is.
    """
    if any(site.name == name for site in sites):
        site = ffn_site(model, name, sites)
        return Point(site.name, site.up, site.down), (site.width, site.width)
    _, inside, outside = linear(model, name)
    return Point(name, name, name), (inside, outside)


def _prepare_part(
    model: nn.Module,
    patches: PatchSet,
    set_name: str,
    name: str,
    sites: list[FFNSite],
    typical: Mapping[str, torch.Tensor],
) -> PreparedPart:
    part = patches.parts[name]
    if isinstance(part, PatchNeurons):
        ffn_site(model, part.site, sites)  # a linear layer of that name is not enough
        point, widths = point_at(model, part.site, sites)
    else:
        point, widths = point_at(model, part.site, [])
    if part.widths != widths:
        raise MismatchError(
            f"patch set {set_name!r}, part {name!r} of form {part.form!r}: made for a layer of widths {part.widths}, but "
            f"{part.site!r} of {type(model).__name__} has {widths} (input, output); the set belongs to another base"
        )
    mask = patches.masks[part.mask] if part.mask is not None else None
    gate = patches.gates[part.gate] if part.gate is not None else None
    tensors = dict(part.tensors)
    if mask is not None:
        # A last row of ones, for a row whose language the mask does not know.
        tensors["mask_inner"] = torch.cat([mask.inner, torch.ones_like(mask.inner[:1])])
        tensors["mask_outer"] = torch.cat([mask.outer, torch.ones_like(mask.outer[:1])])
    if gate is not None:
        tensors |= {f"gate_{key}": tensor for key, tensor in gate.tensors.items()}
    prepared = PreparedPart(
        set_name,
        name,
        part,
        point,
        gate,
        mask.languages if mask else None,
        Tensors(tensors, getattr(part, "activation", None), typical.get(point.site)),
    )
    weight = next(model.get_submodule(point.adds).parameters(), None)
    if weight is not None and weight.device.type != "meta":
        prepared.tensors.on(weight.device, compute_dtype(weight.dtype))
    return prepared


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Patches are computed in fp32 beside a layer of fp32, fp16, bf16 or quantised weights, in fp64 beside fp64.

    A key's pre-activation decides whether a neuron fires, and 16-bit sums over D terms move it by more than its margin.
    """
    return (
        torch.promote_types(dtype, torch.float32) if dtype.is_floating_point and dtype.itemsize >= 2 else torch.float32
    )
