"""A private twin of a served model: its own hooks and patches over the same weights, so that watching disturbs nobody."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from xpatch import api
from xpatch.models.wrappers import unwrapped
from xpatch.runtime.attach import WRITERS

_COMPILED = "_orig_mod"


def twin_of(model: nn.Module) -> Any:
    """A copy of `model` in eval mode without patches, which shares every tensor with it and no module.

    What is done to the twin (patches, hooks, modes) is not done to the model, which may answer other calls meanwhile. Parts that
    were compiled are plain in the twin. The copy takes milliseconds and next to no memory.
    """
    model = unwrapped(model)
    with WRITERS:  # nobody puts hooks up or takes them down while they are copied
        memo: dict[int, Any] = {}
        for module in model.modules():
            memo.update((id(tensor), tensor) for tensor in _tensors(module))
        for module in reversed(list(model.modules())):  # inner ones first
            if _COMPILED in module._modules:
                memo[id(module)] = copy.deepcopy(module._modules[_COMPILED], memo)
        twin = copy.deepcopy(model, memo)
    api.remove(twin)
    api.prepare(twin, off=True)
    return twin.eval()


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and tensors a layer keeps elsewhere: as plain attributes, or in an object of its own (quantised layers)."""
    found = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    for value in vars(module).values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif not isinstance(value, (nn.Module, type)) and hasattr(value, "__dict__"):
            found += [inner for inner in vars(value).values() if isinstance(inner, torch.Tensor)]
    return found
