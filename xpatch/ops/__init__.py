"""The maths of a patch as operators: registered ops, their pure-torch reference, and the native build behind them.

``patch_ffn`` and ``patch_ffn_fired``, which also says which neurons fired, share a native kernel; ``BoundPatchFfn`` is both for neurons
that stay; ``lowrank``, ``mask`` and
``ball`` have one each; ``dense`` is plain torch and lives in :mod:`xpatch.ops.reference`.
"""

from xpatch.ops.bound import BoundPatchFfn
from xpatch.ops.reference import ACTIVATIONS, activate, canonical_activation, dense
from xpatch.ops.registry.ball import ball
from xpatch.ops.registry.capacity import patch_ffn_capacity
from xpatch.ops.registry.library import in_torch_func
from xpatch.ops.registry.lowrank import lowrank
from xpatch.ops.registry.mask import mask
from xpatch.ops.registry.patch_ffn import patch_ffn, patch_ffn_fired
from xpatch.ops.screening import pack_balls, pack_keys, screening_stats

__all__ = [
    "ACTIVATIONS",
    "BoundPatchFfn",
    "activate",
    "ball",
    "canonical_activation",
    "dense",
    "in_torch_func",
    "lowrank",
    "mask",
    "pack_balls",
    "pack_keys",
    "patch_ffn",
    "patch_ffn_capacity",
    "patch_ffn_fired",
    "screening_stats",
]
