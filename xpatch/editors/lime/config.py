"""Settings of training LiME: those of the editor behind the masks, and the masks' own.

`paper`: the released settings; the L0 term acts as off there (`l0_weight=0`). Every language is edited and every language is to
follow. The epsilon of MEND's LayerNorm is taken to be torch's.
`default`: the editor's default settings with English (the request's own language) to all languages, and an L0 that acts; the
LayerNorm's epsilon is small beside a gradient's variance.
"""

from __future__ import annotations

from typing import Any

from xpatch.editors.hyper.config import MaskConfig
from xpatch.editors.ke import config as ke
from xpatch.editors.mend import config as mend


class LimeMendConfig(mend.MendConfig, MaskConfig):
    """LiME-MEND."""


class LimeKeConfig(ke.KnowledgeEditorConfig, MaskConfig):
    """LiME-KE."""


_PAPER: dict[str, Any] = {"edit_languages": "all", "outer_languages": "all", "best_by": "harmonic", "l0_weight": 0.0,
                          "outer_texts": "edit", "validate_every": 2000, "patience": 4000}  # fmt: skip
_DEFAULT: dict[str, Any] = {"outer_languages": "all", "l0_weight": 1.0, "mask_rate": 1e-3}

MEND_PRESETS = {
    "paper": LimeMendConfig(**{**mend.PAPER.model_dump(), **_PAPER, "normalisation": "layernorm"}),
    "default": LimeMendConfig(
        **{**mend.DEFAULT.model_dump(), **_DEFAULT, "normalisation": "layernorm", "epsilon": 1e-12}
    ),
}
KE_PRESETS = {
    "paper": LimeKeConfig(**{**ke.FIXED.model_dump(), **_PAPER, "learning_rate": 5e-5}),
    "default": LimeKeConfig(**{**ke.DEFAULT.model_dump(), **_DEFAULT}),
}
