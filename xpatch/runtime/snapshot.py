"""The published state: every applied set, checked and prepared, as one immutable value that calls pin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import ffn_site, linear
from xpatch.patches.types import ACTIVATIONS, DenseDelta, Gate, LanguageMask, LowRankDelta, Part, PatchNeurons, PatchSet

_BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class Point:
    """A place where patches join: the module whose input they read and the module whose output they add to."""

    site: str
    reads: str
    adds: str


class Tensors:
    """A part's tensors, cast once per device and dtype. What is handed out is never written to."""

    def __init__(self, masters: Mapping[str, torch.Tensor]) -> None:
        self._masters = dict(masters)
        self._cast: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors for this device and dtype; two threads that meet here both cast and one result stays."""
        cast = self._cast.get((device, dtype))
        if cast is None:
            # A tensor made in inference mode could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                cast = {name: tensor.detach().to(device=device, dtype=dtype).contiguous() for name, tensor in self._masters.items()}
            self._cast[(device, dtype)] = cast
        return cast

    def __getstate__(self) -> dict[str, Any]:
        return {"_masters": self._masters, "_cast": {}}


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

    @property
    def count(self) -> int:
        """Neurons, ranks, or 1 for a dense delta."""
        if isinstance(self.part, PatchNeurons):
            return int(self.part.keys.shape[0])
        return int(self.part.down.shape[0]) if isinstance(self.part, LowRankDelta) else 1

    @property
    def bytes(self) -> int:
        """Size of the part's tensors in fp32."""
        return _BYTES_PER_FLOAT * sum(tensor.numel() for tensor in _tensors(self.part).values())


@dataclass(frozen=True, eq=False)
class AppliedSet:
    """A named set with its prepared parts."""

    name: str
    patches: PatchSet
    fingerprint: str
    parts: tuple[PreparedPart, ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that is applied to a model at one moment. at: site -> its parts, in the order the sets were applied."""

    version: int = 0
    sets: Mapping[str, AppliedSet] = field(default_factory=lambda: MappingProxyType({}))
    at: Mapping[str, tuple[PreparedPart, ...]] = field(default_factory=lambda: MappingProxyType({}))
    masked: tuple[str, ...] = ()

    @classmethod
    def of(cls, sets: Mapping[str, AppliedSet], version: int) -> Snapshot:
        at: dict[str, tuple[PreparedPart, ...]] = {}
        for applied in sets.values():
            for part in applied.parts:
                at[part.point.site] = (*at.get(part.point.site, ()), part)
        masked = tuple(name for name, applied in sets.items() if any(part.languages for part in applied.parts))
        return cls(version, MappingProxyType(dict(sets)), MappingProxyType(at), masked)

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


def prepare(model: nn.Module, patches: PatchSet, name: str) -> AppliedSet:
    """Check every part against `model` and cast its tensors for the layer it joins. Raises `MismatchError`; changes nothing."""
    parts = tuple(_prepare_part(model, patches, name, key) for key in patches.parts)
    return AppliedSet(name, patches, patches.fingerprint, parts)


def _prepare_part(model: nn.Module, patches: PatchSet, set_name: str, name: str) -> PreparedPart:
    part = patches.parts[name]
    where = f"patch set {set_name!r}, part {name!r}"
    if isinstance(part, PatchNeurons):
        site = ffn_site(model, part.site)
        point, inside, outside = Point(site.name, site.up, site.down), site.width, site.width
        shapes = {"keys": (part.keys, inside), "values": (part.values, outside)}
        if part.activation not in ACTIVATIONS:
            raise MismatchError(f"{where}: unknown activation {part.activation!r}; known are {', '.join(ACTIVATIONS)}")
    else:
        _, inside, outside = linear(model, part.site)
        point = Point(part.site, part.site, part.site)
        if isinstance(part, LowRankDelta):
            shapes = {"down": (part.down, inside), "up (transposed)": (part.up.t(), outside)}
        else:
            shapes = {"weight": (part.weight, inside), "weight (transposed)": (part.weight.t(), outside)}
            if part.bias is not None:
                shapes["bias"] = (part.bias, outside)
    mask = _named(patches.masks, part.mask, "language mask", where)
    gate = _named(patches.gates, part.gate, "gate", where)
    tensors = _tensors(part)
    if mask is not None:
        shapes |= {"its mask's inner": (mask.inner, inside), "its mask's outer": (mask.outer, outside)}
        tensors |= _mask_tables(mask)
    if gate is not None and gate.kind == "ball":
        if gate.keys is None or gate.radii is None:
            raise MismatchError(f"{where}: its gate of kind 'ball' needs keys and radii")
        shapes["its gate's keys"] = (gate.keys, inside)
        tensors |= {"gate_keys": gate.keys, "gate_radii": gate.radii}
    for what, (tensor, width) in shapes.items():
        if tensor.shape[-1] != width:
            raise MismatchError(
                f"{where}: {what} has width {tensor.shape[-1]}, but {part.site!r} of {type(model).__name__} has {width}; "
                "the set was made for another base"
            )
    prepared = PreparedPart(set_name, name, part, point, gate, mask.languages if mask else None, Tensors(tensors))
    weight = next(model.get_submodule(point.adds).parameters(), None)
    if weight is not None and weight.device.type != "meta":
        prepared.tensors.on(weight.device, compute_dtype(weight.dtype))
    return prepared


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Patches are computed in fp32 beside a layer of fp32, fp16, bf16 or quantised weights, in fp64 beside fp64.

    A key's pre-activation decides whether a neuron fires, and 16-bit sums over D terms move it by more than its margin.
    """
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point and dtype.itemsize >= 2 else torch.float32


def _tensors(part: Part) -> dict[str, torch.Tensor]:
    if isinstance(part, PatchNeurons):
        return {"keys": part.keys, "bias": part.bias, "values": part.values}
    if isinstance(part, LowRankDelta):
        return {"down": part.down, "up": part.up}
    return {"weight": part.weight} | ({"bias": part.bias} if part.bias is not None else {})


def _mask_tables(mask: LanguageMask) -> dict[str, torch.Tensor]:
    """The mask's rows and a last row of ones, for a row whose language the mask does not know."""
    return {
        "mask_inner": torch.cat([mask.inner, torch.ones_like(mask.inner[:1])]),
        "mask_outer": torch.cat([mask.outer, torch.ones_like(mask.outer[:1])]),
    }


def _named(table: Mapping[str, Any], name: str | None, kind: str, where: str) -> Any:
    if name is None:
        return None
    if name not in table:
        raise MismatchError(f"{where}: names the {kind} {name!r}; the set has {', '.join(map(repr, table)) or 'none'}")
    return table[name]


__all__ = ["DenseDelta", "EMPTY", "AppliedSet", "Point", "PreparedPart", "Snapshot", "compute_dtype", "prepare"]
