"""The promise that editing leaves no trace on the model, and the words for a model that cannot be edited."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xpatch.errors import ConflictError, MismatchError


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; every module's training flag and parameter's requires_grad as before after it.

    Autocast and inference mode of the caller are switched off inside, autograd is on.
    """
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = next(model.parameters()).device.type
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)


def check_editable(model: object) -> None:
    """Raise where `model` is not a plain fp32 torch model on one device."""
    if not isinstance(model, torch.nn.Module):
        raise MismatchError(
            f"model: expected a torch.nn.Module, found {type(model).__name__}; load it with transformers first"
        )
    if hasattr(model, "_orig_mod"):
        raise ConflictError(
            "model: found a compiled model (torch.compile); edit the plain model, then apply the patches"
        )
    kinds = {parameter.dtype for parameter in model.parameters()}
    if kinds != {torch.float32}:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "no parameters"
        raise MismatchError(
            f"model: expected float32 weights, found {found}; edit model.float() of the same checkpoint, "
            "the patches then fit its fp16 and bf16 copies too"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise MismatchError(
            f"model: expected all weights on one device, found {', '.join(sorted(devices))}; load it on one"
        )
