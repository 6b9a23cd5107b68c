"""The maths of a patch as operators: two registered ops, their pure-torch reference, and the native build behind them.

``patch_ffn`` and ``patch_ffn_fired``, which also says which neurons fired, share the only native kernel; ``lowrank``, ``dense``
and ``mask`` are plain torch and live in :mod:`xpatch.ops.reference`.
"""

from xpatch.ops.reference import ACTIVATIONS, activate, canonical_activation, dense, lowrank, mask
from xpatch.ops.registry.capacity import patch_ffn_capacity
from xpatch.ops.registry.library import in_torch_func
from xpatch.ops.registry.patch_ffn import patch_ffn, patch_ffn_fired

__all__ = [
    "ACTIVATIONS",
    "activate",
    "canonical_activation",
    "dense",
    "in_torch_func",
    "lowrank",
    "mask",
    "patch_ffn",
    "patch_ffn_capacity",
    "patch_ffn_fired",
]
