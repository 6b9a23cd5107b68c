"""Models whose code was compiled.

Code that `torch.compile` made before a site's hooks were put up ignores them, so patches there would do nothing. Code made
afterwards holds the hooks, and notices when others are added, as long as the compiler guards on hooks: it does not by default,
so `guard_on_hooks` asks it to, before it compiles anything with patches.
"""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any

import torch
from torch import nn

from xpatch.errors import ConflictError

_guarding = False


def guard_on_hooks() -> None:
    """From now on compiled code checks the hooks of the modules it runs. Costs nothing while nothing is compiled."""
    global _guarding
    if _guarding:
        return
    dynamo = sys.modules.get("torch._dynamo")
    config = getattr(dynamo, "config", None)
    if config is not None:  # the compiler may not have been loaded yet, and loading it takes seconds
        config.skip_nnmodule_hook_guards = False
        _guarding = True


def is_compiled(model: nn.Module) -> str | None:
    """How and where `model`, a part of it, or a `torch.compile` wrapper around it was compiled; None if it was not.

    Costs a pass over all objects of the process (tens of ms in a large one).
    """
    for name, module in model.named_modules():
        found = _how(module)
        if found is not None:
            return f"its module {name!r} {found}" if name else f"it {found}"
    if _is_wrapped(model):
        return "torch.compile(model) wraps it"
    return None


def refuse_compiled(model: nn.Module) -> None:
    """Raises `ConflictError` for a model that was compiled before xpatch put anything on it; warns where that cannot be known."""
    found = is_compiled(model)
    if found is not None:
        raise ConflictError(
            f"{type(model).__name__} cannot be patched yet because {found}: code compiled before ignores hooks added later, so the "
            "patches would do nothing. Call xpatch.prepare(model) first: it puts up the sites and drops the compiled code, so that "
            "the next call compiles again; after that, apply and remove take effect without compiling"
        )
    if not _guarding and _something_was_compiled():
        warnings.warn(
            f"code was compiled in this process before {type(model).__name__} was patched. If a function of yours that calls this "
            "model was among it, it may leave the patches out: call xpatch.prepare(model) or torch.compiler.reset()",
            UserWarning,
            stacklevel=3,
        )


def refuse_script(model: nn.Module) -> None:
    """Raises `ConflictError` for TorchScript, whose code cannot take a patch at all."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConflictError(
                f"{type(model).__name__} cannot be patched because its module {name!r} is a TorchScript module, which runs no hooks; "
                "apply the patches to the plain model"
            )


def drop_compiled_code() -> None:
    """Let everything in this process compile again on its next call."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _how(module: nn.Module) -> str | None:
    if "_orig_mod" in module._modules:
        return "is a torch.compile wrapper"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "was compiled by module.compile()"
    if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
        return "has a compiled forward"
    return None


def _is_wrapped(model: nn.Module) -> bool:
    """Whether a `torch.compile` wrapper refers to the model (the wrapper holds it as its submodule `_orig_mod`)."""
    return any(isinstance(holder, dict) and holder.get("_orig_mod") is model for holder in gc.get_referrers(model))


def _something_was_compiled() -> bool:
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    counters = getattr(dynamo, "counters", {})
    return bool(counters.get("frames", {}).get("ok", 0)) if counters else False
