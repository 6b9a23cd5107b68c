"""MPN's presets. `paper` is Transformer-Patcher's training with MPN's samplers; `default` is the best setting known."""

from __future__ import annotations

from xpatch.editors.t_patcher.config import DEFAULT as T_PATCHER
from xpatch.editors.t_patcher.config import DEFAULT_LM as T_PATCHER_LM
from xpatch.editors.t_patcher.config import PAPER, PAPER_LM

# What the paper leaves open, and what is taken here: the batch holds the language versions in turn (8 rows or more); the key is
# made from the edit's own (English) text; training stops when all trained versions are right; the language of "only" is
# drawn uniformly with the call's seed; "all" trains on all versions.

_ALL = {"rephrases": True, "memory_languages": "all", "memory_rows": 12_000}
DEFAULT = T_PATCHER.model_copy(update=_ALL)
DEFAULT_LM = T_PATCHER_LM.model_copy(update=_ALL)

PRESETS = {"paper": PAPER, "default": DEFAULT}
LM_PRESETS = {"paper": PAPER_LM, "default": DEFAULT_LM}
