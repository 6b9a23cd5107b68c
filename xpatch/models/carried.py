"""Which patch sets a model carries, for rooms below the runtime that puts them there."""

from __future__ import annotations

from typing import Any

from xpatch.models.wrappers import unwrapped


def carried(model: Any) -> tuple[str, ...]:
    """The fingerprints of the patch sets applied to `model`, in order. A hook that serves sets names them (its `carried`)."""
    hooks = unwrapped(model)._forward_pre_hooks.values()
    return next((tuple(hook.carried) for hook in hooks if hasattr(hook, "carried")), ())
