"""Real models with two patch sets of two sites each, the same maths written out in float64, and the check that nothing stays behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import xpatch
from xpatch import LowRankDelta, PatchNeurons, PatchSet
from xpatch.models.anatomy import find_ffn_sites, linear
from xpatch.patches.identity import identify
from xpatch.runtime.attach import runtime_of


def make_sets(model: nn.Module, *, seed: int = 0, base: bool = True) -> dict[str, PatchSet]:
    """ "neurons": beside the first and the last FFN; "deltas": beside a linear layer of each. Made for `model` where `base`."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    sites = find_ffn_sites(model)
    first, last = sites[0], sites[-1]
    neurons = {
        "early": PatchNeurons(first.name, random(5, first.width), random(5), random(5, first.width), "relu"),
        "late": PatchNeurons(last.name, random(4, last.width), random(4), random(4, last.width), "gelu"),
    }
    up = linear(model, last.up)[2]
    deltas = {
        "early": LowRankDelta(first.down, random(3, first.inner) / 4, random(first.width, 3)),
        "late": LowRankDelta(last.up, random(2, last.width) / 4, random(up, 2)),
    }
    identity = identify(model, site=[first.name, last.name]) if base else None
    return {"neurons": PatchSet(neurons, base=identity), "deltas": PatchSet(deltas, base=identity)}


def apply_all(model: Any, sets: Mapping[str, PatchSet]) -> Any:
    for name, patches in sets.items():
        xpatch.apply(model, patches, name=name)
    return model


class Beside(nn.Module):
    """`linear(x)` and every part that joins it, as formulas. entered: the FFN's input, where the linear is its down projection."""

    def __init__(self, inner: nn.Module, parts: list[Any], entered: list[torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.parts, self.entered = inner, parts, entered

    @property
    def weight(self) -> Any:
        return self.inner.weight  # T5 asks for its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        y = self.inner(hidden)
        for part in self.parts:
            tensors = {name: tensor.to(y.dtype) for name, tensor in part.tensors.items()}
            if isinstance(part, PatchNeurons):
                score = self.entered[-1] @ tensors["keys"].T + tensors["bias"]
                act = torch.relu(score) if part.activation == "relu" else nn.functional.gelu(score)
                y = y + act @ tensors["values"]
            else:
                y = y + hidden @ tensors["down"].T @ tensors["up"].T
        return y


def written_out(model: nn.Module, sets: Mapping[str, PatchSet], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy of the unpatched `model` in `dtype` with all parts of `sets` as plain modules."""
    twin = copy.deepcopy(model).to(dtype)
    sites = {site.name: site for site in find_ffn_sites(twin)}
    at: dict[str, list[Any]] = {}
    inputs: dict[str, list[torch.Tensor]] = {}
    for part in (part for patches in sets.values() for part in patches.parts.values()):
        site = sites.get(part.site)
        at.setdefault(site.down if site else part.site, []).append(part)
        if site is not None:
            inputs.setdefault(site.up, [])
    for name, parts in at.items():
        up = next((site.up for site in sites.values() if site.down == name), "")
        parent, _, last = name.rpartition(".")
        beside = Beside(linear(twin, name)[0], parts, inputs.get(up, []))
        setattr(twin.get_submodule(parent), last, beside)
    for up, entered in inputs.items():

        def remember(module: nn.Module, args: Any, entered: list[torch.Tensor] = entered) -> None:
            entered[:] = [args[0]]

        twin.get_submodule(up).register_forward_pre_hook(remember)
    return twin


def ask(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """The logits for `ids [B, T]`; an encoder-decoder reads them on both sides."""
    if getattr(model.config, "is_encoder_decoder", False):
        more = {"decoder_input_ids": ids, **more}
    return model(input_ids=ids, **more).logits


def take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameter -> gradient, which is taken off; under the names of the plain model (the side path's layers hold theirs as `.inner`)."""
    found = {
        name.replace(".inner.", "."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Named tensors in float64, equal up to the order of sums."""
    assert found and found.keys() == expected.keys()
    for name in expected:
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(found[name], expected[name], atol=1e-9, rtol=1e-6, msg=message)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)


def assert_no_trace(model: Any, base: Any, ids: torch.Tensor | None = None) -> None:
    """`model`, all patches removed, is `base` again: weights bit for bit, answers bit for bit, nothing of xpatch on it."""
    xpatch.remove(model)
    assert runtime_of(model) is None
    own = {name for module in model.modules() for name in vars(module)}
    assert not own & {"generate", "save_pretrained"}
    found, expected = model.state_dict(), base.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(bits(found[key]), bits(expected[key])) for key in expected)
    if ids is not None:
        with torch.no_grad():
            assert torch.equal(ask(model, ids), ask(base, ids))


@pytest.fixture
def sets_for() -> Callable[..., dict[str, PatchSet]]:
    return make_sets


@pytest.fixture
def patched() -> Callable[..., Any]:
    return apply_all


@pytest.fixture
def side_path() -> Callable[..., nn.Module]:
    return written_out


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    return ask


@pytest.fixture
def no_trace() -> Callable[..., None]:
    return assert_no_trace


@pytest.fixture
def gradients() -> Callable[..., dict[str, torch.Tensor]]:
    return take_gradients


@pytest.fixture
def close() -> Callable[..., None]:
    return assert_close
