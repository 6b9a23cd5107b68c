"""Training state in one safetensors file: weights, Adam's moments and the step, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

NAME = "checkpoint.safetensors"


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write `checkpoint.safetensors` to `folder`; tied weights are stored once."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    temporary = folder / f"{NAME}.tmp"
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(folder / NAME)


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Fill `model` (and `optimizer`) from `folder` and return the step; 0 where there is no checkpoint."""
    if not (folder / NAME).exists():
        return 0
    moments: dict[int, dict[str, torch.Tensor]] = {}
    parameters = dict(model.named_parameters())
    with safe_open(folder / NAME, framework="pt") as file, torch.no_grad():
        for name in file.keys():
            kind, _, rest = name.partition(".")
            if kind == "model":
                parameters[rest].copy_(file.get_tensor(name))
            elif optimizer is not None:
                index, moment = rest.split(".", 1)
                moments.setdefault(int(index), {})[moment] = file.get_tensor(name)
        step = int(file.metadata()["step"])
    if optimizer is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return step
