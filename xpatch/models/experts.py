"""Mixtures of experts: the block as a whole is one FFN with one place for patches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from xpatch.models.linears import linears

_ROUTERS = ("router", "gate")


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts block `y = Σ route(x)_e expert_e(x)`. width: D. count: experts. inner: F of one, 0 if not found."""

    width: int
    count: int
    inner: int


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is a mixture-of-experts block: it holds a router, or its experts, directly."""
    return any(name in ("experts", "router") for name, _ in module.named_children())


def experts_in(module: nn.Module) -> Experts | None:
    """The sizes of a mixture-of-experts block, read from its router (`[experts, D]`); None where that has no weights."""
    sizes = None
    for name in _ROUTERS:
        router = getattr(module, name, None)
        sizes = sizes or (_router_sizes(router) if isinstance(router, nn.Module) else None)
    if sizes is None:
        return None
    count, width = sizes
    fused = [parameter.shape[1:] for parameter in module.parameters() if parameter.ndim == 3]
    inner = [size for shape in fused for size in _without(width, [int(size) for size in shape])]
    if not inner:
        inner = [
            other.outside
            for other in linears(module)
            if "expert" in other.name and "shared" not in other.name and other.inside == width and other.outside > 1
        ]
    return Experts(width, count, min(inner, default=0))


def _router_sizes(router: nn.Module) -> tuple[int, int] | None:
    for module in router.modules():
        inside, outside = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(inside, int) and isinstance(outside, int):
            return outside, inside
    for parameter in router.parameters():
        if parameter.ndim == 2:
            return int(parameter.shape[0]), int(parameter.shape[1])
    return None


def _without(width: int, shape: list[int]) -> list[int]:
    """The other axis of a fused weight `[experts, ., .]` whose one axis is D."""
    if width in shape:
        shape.remove(width)
    return shape
