"""The maths of a patch as operators: one registered op, its pure-torch reference, and the native build behind it.

``patch_ffn`` is the only op with a native kernel; ``lowrank``, ``dense`` and ``mask`` are plain torch and live in
:mod:`xpatch.ops.reference`.
"""

from xpatch.ops.reference import ACTIVATIONS, activate, canonical_activation, dense, lowrank, mask
from xpatch.ops.registry import patch_ffn

__all__ = ["ACTIVATIONS", "activate", "canonical_activation", "dense", "lowrank", "mask", "patch_ffn"]
