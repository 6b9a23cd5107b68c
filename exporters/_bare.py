"""A model that is exported carries no patches."""

from __future__ import annotations

from torch import nn

from xpatch.errors import ConflictError


def check_bare(model: nn.Module) -> None:
    """Raise `ConflictError` where patches are applied: they would be frozen into what is exported."""
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if type(hook).__module__.startswith("xpatch.") or getattr(hook, "__module__", "").startswith(
                "xpatch.runtime"
            ):
                raise ConflictError(
                    f"{type(model).__name__} has patches applied (at {name or 'the model itself'!r}), which would be frozen into the export; "
                    "call xpatch.remove(model) first and export the patches by themselves"
                )
