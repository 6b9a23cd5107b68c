"""The method `mend`."""

from __future__ import annotations

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.hyper.editor import HyperEditor

EDITS = "sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2), single texts and pairs; one language, held in those its editor was trained for"

register(
    HyperEditor(
        MethodInfo(
            name="mend",
            title="MEND",
            paper="Mitchell, Lin, Bosselut, Finn and Manning 2022, Fast Model Editing at Scale",
            url="https://arxiv.org/abs/2110.11309",
            edits=EDITS,
            separable=True,
        )
    )
)
