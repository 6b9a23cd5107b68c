"""Where a model can be patched, and what follows its final FFN: found by structure, not by class name."""

from xpatch.models.anatomy import FFNSite, final_ffn, find_ffn_sites
from xpatch.models.features import Features, capture
from xpatch.models.heads import Head, head_of

__all__ = ["FFNSite", "Features", "Head", "capture", "final_ffn", "find_ffn_sites", "head_of"]
