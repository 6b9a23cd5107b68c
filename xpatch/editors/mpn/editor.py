"""MPN: one patch neuron per edit for all languages. Transformer-Patcher's procedure with other samplers."""

from __future__ import annotations

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.mpn.config import LM_PRESETS, PRESETS
from xpatch.editors.samplers import all_parallel, one_parallel
from xpatch.editors.t_patcher.editor import EDITS, MODELS, PatchNeuronEditor

_PAPER = "Si, Zhang and Zhang 2024, MPN: Leveraging Multilingual Patch Neuron for Cross-lingual Model Editing"
_URL = "https://arxiv.org/abs/2401.03190"

register(
    PatchNeuronEditor(
        MethodInfo(
            name="mpn-only",
            title="MPN (only)",
            paper=_PAPER,
            url=_URL,
            edits=EDITS + "the edit's own language and one other",
            separable=True,
            parallel=True,
            models=MODELS,
            resumes=True,
        ),
        PRESETS,
        one_parallel,
        LM_PRESETS,
    )
)
register(
    PatchNeuronEditor(
        MethodInfo(
            name="mpn",
            title="MPN (all)",
            paper=_PAPER,
            url=_URL,
            edits=EDITS + "every language given",
            separable=True,
            parallel=True,
            models=MODELS,
            resumes=True,
        ),
        PRESETS,
        all_parallel,
        LM_PRESETS,
    )
)
