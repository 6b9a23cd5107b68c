"""The weights of a base as its plain model would name them, whatever wraps the model or its layers and wherever they are kept.

Inside a PEFT model the linear layer "dense" is an adapter layer that holds the base's own as "dense.base_layer"; `torch.compile`
puts "_orig_mod" into names; accelerate leaves a weight it offloads on the meta device and its values in a map, or on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

COMPILED = "_orig_mod"
# In the order they are looked for: the layer of an adapter; the module of `modules_to_save`, or with trainable tokens the adapter in
# its place; a PeftModel's tuner; a tuner's model.
_ADAPTED = ("base_layer", "original_module", "token_adapter", "base_model", "model")


def behind(module: nn.Module) -> nn.Module | None:
    """The module that `module` stands in front of (`torch.compile`, data parallelism, PEFT's models and layers); None for others."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    children = module._modules
    if COMPILED in children:
        return children[COMPILED]
    if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
        return next((children[name] for name in _ADAPTED if children.get(name) is not None), None)
    return None


def innermost(module: nn.Module) -> nn.Module:
    """The module behind all that stands in front of it; itself where nothing does."""
    inner = behind(module)
    while inner is not None:
        module, inner = inner, behind(inner)
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()` would be without adapters and wrappers: neither they nor what they hold themselves."""
    return _walk(model, "", set())


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `model.named_parameters()` would be without adapters and wrappers; shared ones once."""
    seen: set[int] = set()
    for prefix, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter


def offloaded(model: nn.Module) -> dict[int, Callable[[], torch.Tensor]]:
    """id of each weight that accelerate has offloaded -> what loads its values."""
    found: dict[int, Callable[[], torch.Tensor]] = {}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # several may be chained into one
            values = getattr(each, "weights_map", None)
            if values is None:
                continue
            deep = bool(getattr(each, "place_submodules", False))
            for owned in (module.named_parameters(recurse=deep), module.named_buffers(recurse=deep)):
                found |= {id(tensor): _loader(values, name) for name, tensor in owned if tensor.is_meta}
    return found


def tied(model: nn.Module) -> Callable[[str], bool]:
    """Whether a weight of this name may be shared with another: offloaded, they are two tensors, so only the model can tell."""
    keys: Any = getattr(model, "all_tied_weights_keys", None)  # transformers 5: target -> source
    patterns = [re.escape(name) for name in (*keys, *keys.values())] if isinstance(keys, Mapping) else None
    if patterns is None:
        patterns = list(getattr(model, "_tied_weights_keys", None) or ())
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = innermost(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield prefix, module
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}.{name}" if prefix else name, seen)


def _loader(values: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    return lambda: values[name]
