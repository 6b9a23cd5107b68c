"""MPN: one patch neuron per edit for all languages. Transformer-Patcher's procedure with other samplers."""

from __future__ import annotations

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.mpn.config import PRESETS
from xpatch.editors.samplers import all_parallel, one_parallel
from xpatch.editors.t_patcher.editor import PatchNeuronEditor

_PAPER = "Si, Zhang and Zhang 2024, MPN: Leveraging Multilingual Patch Neuron for Cross-lingual Model Editing"
_URL = "https://arxiv.org/abs/2401.03190"
_EDITS = "sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2), single texts and pairs; "

register(
    PatchNeuronEditor(
        MethodInfo(
            name="mpn-only",
            title="MPN (only)",
            paper=_PAPER,
            url=_URL,
            edits=_EDITS + "the edit's own language and one other",
            separable=True,
        ),
        PRESETS,
        one_parallel,
    )
)
register(
    PatchNeuronEditor(
        MethodInfo(
            name="mpn", title="MPN (all)", paper=_PAPER, url=_URL, edits=_EDITS + "every language given", separable=True
        ),
        PRESETS,
        all_parallel,
    )
)
