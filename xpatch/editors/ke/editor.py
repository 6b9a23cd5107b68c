"""The method `ke`."""

from __future__ import annotations

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.hyper.editor import HyperEditor
from xpatch.editors.mend.editor import EDITS

register(
    HyperEditor(
        MethodInfo(
            name="ke",
            title="KnowledgeEditor",
            paper="De Cao, Aziz and Titov 2021, Editing Factual Knowledge in Language Models",
            url="https://arxiv.org/abs/2104.08164",
            edits=EDITS,
            separable=True,
        )
    )
)
