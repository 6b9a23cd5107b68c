"""The oracle of these tests: a copy of the model with plain hooks that add the patch, written out in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from xpatch import DenseDelta, LowRankDelta, PatchNeurons, PatchSet
from xpatch.models.anatomy import ffn_site, find_ffn_sites


def beside(model: nn.Module, patches: PatchSet) -> nn.Module:
    """Put the hooks on `model` itself; returns it. For neurons x enters the up projection, or a whole mixture of experts."""
    for part in patches.parts.values():
        reads = adds = part.site
        if isinstance(part, PatchNeurons):
            site = ffn_site(model, part.site)
            reads, adds = (site.name, site.name) if site.experts else (site.up, site.down)
        seen: list[torch.Tensor] = []
        model.get_submodule(reads).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))

        def hook(module: nn.Module, args: Any, output: Any, part: Any = part, seen: Any = seen) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            delta = written_out(part, seen.pop().double()).reshape(y.shape)
            y = (y.double() + delta).to(y.dtype)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        model.get_submodule(adds).register_forward_hook(hook)
    return model


def written_out(part: Any, x: torch.Tensor) -> torch.Tensor:
    """`Σ relu(x·k + b) v` neuron by neuron, `up (down x)`, or `ΔW x + Δb`; x `[..., D_in]`."""
    tensors = {name: tensor.double() for name, tensor in part.tensors.items()}
    if isinstance(part, LowRankDelta):
        return torch.einsum("...i,ri,or->...o", x, tensors["down"], tensors["up"])
    if isinstance(part, DenseDelta):
        return torch.einsum("...i,oi->...o", x, tensors["weight"]) + tensors.get("bias", 0)
    total = torch.zeros_like(x)
    for key, bias, value in zip(tensors["keys"], tensors["bias"], tensors["values"], strict=True):
        total += torch.relu((x * key).sum(-1, keepdim=True) + bias) * value
    return total


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 copy, with the parts swapped that know no float64."""
    twin = copy.deepcopy(model)
    if "XGLM" not in type(model).__name__:  # cannot mask its attention in float64
        twin.double()
    if any(site.experts for site in find_ffn_sites(model)) and hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")
    return twin


def same(served: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    """What the patch did is what was expected, to a thousandth of it."""
    effect = float((expected - base).abs().max())
    assert effect > 1e-5
    assert float((served - expected).abs().max()) < 1e-3 * effect


@pytest.fixture
def side_path() -> Callable[..., nn.Module]:
    """`side_path(model, patches)`: a float64 copy that answers as the patched model should."""
    return lambda model, patches: beside(in_float64(model), patches)


@pytest.fixture
def side_path_on() -> Callable[..., nn.Module]:
    """`side_path_on(model, patches)`: the same on `model` itself, in its own precision."""
    return beside


@pytest.fixture
def twin_of() -> Callable[[nn.Module], nn.Module]:
    return in_float64


@pytest.fixture
def assert_same() -> Callable[..., None]:
    return same


@pytest.fixture
def check() -> Callable[..., None]:
    """Served in fp32 the patched model answers as its twin; switched off or taken off, as its base does, bit for bit."""
    import xpatch

    def run(model: nn.Module, patches: PatchSet, twin: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        base = model(**inputs)[0]
        xpatch.apply(model, patches, name="here")
        same(model(**inputs)[0], twin(**inputs)[0], base)
        with xpatch.disabled(model):
            assert torch.equal(model(**inputs)[0], base)
        assert torch.equal(xpatch.remove(model)(**inputs)[0], base)

    return run
