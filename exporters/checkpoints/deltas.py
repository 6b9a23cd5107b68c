"""Deltas added to the weights of their linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import linear
from xpatch.patches.types import DenseDelta, LowRankDelta, Part

Change = Callable[[torch.Tensor], torch.Tensor]


def changes(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Change]:
    """Name of a parameter -> what it becomes (fp32 to fp32), for all deltas of `parts`.

    Raises `MismatchError` for a quantised layer, one that shares its weight with another module, and a bias where there is none.
    """
    sums: dict[str, list[Part]] = {}
    for part in parts.values():
        if isinstance(part, (LowRankDelta, DenseDelta)):
            sums.setdefault(part.site, []).append(part)
    found: dict[str, Change] = {}
    for site, deltas in sums.items():
        module, inside, outside = linear(model, site)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.numel() != inside * outside:
            raise MismatchError(
                f"{site!r} is quantised ({type(module).__name__}): a delta cannot be added to its weight; load the model in fp16, bf16 or fp32"
            )
        _check_alone(model, f"{site}.weight")
        found[f"{site}.weight"] = _weight(deltas, transposed=type(module).__name__ == "Conv1D")
        biases = [part.bias for part in deltas if isinstance(part, DenseDelta) and part.bias is not None]
        if biases and getattr(module, "bias", None) is None:
            raise MismatchError(
                f"a delta changes the bias of {site!r}, which has none; serve the set with xpatch.apply"
            )
        if biases:
            found[f"{site}.bias"] = _plus(torch.stack(biases).sum(0))
    return found


def _weight(deltas: list[Part], *, transposed: bool) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        for part in deltas:
            delta = part.up @ part.down if isinstance(part, LowRankDelta) else part.weight  # type: ignore[union-attr]
            weight = weight + (delta.T if transposed else delta)
        return weight

    return change


def _plus(delta: torch.Tensor) -> Change:
    return lambda bias: bias + delta


def _check_alone(model: nn.Module, name: str) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name not in parameters:
        raise MismatchError(
            f"{type(model).__name__} has no parameter {name!r}; export from the plain model, without adapters"
        )
    same = [other for other, value in parameters.items() if value is parameters[name] and other != name]
    if same:
        raise MismatchError(
            f"{name!r} is the same tensor as {same[0]!r}: a delta meant for one would change both; untie them, or serve the set with xpatch.apply"
        )
