"""Models whose code was compiled: hooks added to them afterwards would be silently ignored."""

from __future__ import annotations

import gc

import torch
from torch import nn

from xpatch.errors import ConflictError

_NEXT = "Apply the patches to the plain model and serve it uncompiled; torch.compile's wrapper keeps it in `_orig_mod`"


def refuse_compiled(model: nn.Module, *, look_for_wrapper: bool = True) -> None:
    """Raises `ConflictError` if `model`, a part of it, or a `torch.compile` wrapper around it was compiled.

    `look_for_wrapper` costs a pass over all objects of the process (tens of ms in a large one).
    """
    for name, module in model.named_modules():
        found = _how(module)
        if found is not None:
            where = f"its module {name!r}" if name else "it"
            raise ConflictError(
                f"{type(model).__name__} cannot be patched because {where} {found}: compiled code ignores hooks added later, so the "
                f"patches would do nothing. {_NEXT}"
            )
    if look_for_wrapper and _is_wrapped(model):
        raise ConflictError(
            f"{type(model).__name__} cannot be patched because torch.compile(model) wraps it: the wrapper may already hold compiled "
            f"code that ignores hooks added later. {_NEXT}; to patch the plain model, let go of the wrapper first"
        )


def refuse_compiler(module: nn.Module) -> None:
    """Raises `ConflictError` for a patched model that torch.compile is about to run."""
    raise ConflictError(
        f"this {type(module).__name__} has patches applied and runs under torch.compile, which can leave hooks out of its code: the "
        "answer might be unpatched. Call the plain model, or remove the patches (xpatch.remove) before compiling it"
    )


def _how(module: nn.Module) -> str | None:
    if "_orig_mod" in module._modules:
        return "is a torch.compile wrapper"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "was compiled by module.compile()"
    if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
        return "has a compiled forward"
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript module"
    return None


def _is_wrapped(model: nn.Module) -> bool:
    """Whether a `torch.compile` wrapper refers to the model (the wrapper holds it as its submodule `_orig_mod`)."""
    return any(isinstance(holder, dict) and holder.get("_orig_mod") is model for holder in gc.get_referrers(model))
