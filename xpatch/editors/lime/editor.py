"""The methods `lime-ke` and `lime-mend`."""

from __future__ import annotations

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.hyper.editor import HyperEditor
from xpatch.editors.mend.editor import EDITS

_PAPER = "Xu, Hou, Che and Zhang 2023, Language Anisotropic Cross-Lingual Model Editing"
_URL = "https://arxiv.org/abs/2205.12677"

for name, title in (("lime-ke", "LiME on KnowledgeEditor"), ("lime-mend", "LiME on MEND")):
    register(HyperEditor(MethodInfo(name=name, title=title, paper=_PAPER, url=_URL, edits=EDITS, separable=True)))
