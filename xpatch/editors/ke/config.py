"""Settings of training KnowledgeEditor.

`paper`: the paper's own training: every matrix of the encoder, the condition "{answer} >> {new answer} || {input}", one edit and 255
texts to keep per step, the Lagrangian, centred RMSprop. The margin shrinks at a validation (the reference: at an epoch's end)
with more than 90 % of the flips right; the multiplier climbs by its plain gradient.
`fixed`: the "EFK" of MEND, LiME and XME: the FFN matrices of three layers, the input alone as condition, the fixed objective.
`default`: as `fixed`, trained quickly: the softmax over D_out rows leaves steps of about 1/D_out at the start, which `max_scale`
makes up for, and the embeddings stay the base's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xpatch.editors.hyper.config import TrainConfig


class KnowledgeEditorConfig(TrainConfig):
    """KnowledgeEditor's network and its training."""

    hidden: int = Field(default=128, ge=1)
    """Width of the LSTM in each direction and of each matrix's head."""
    condition: int = Field(default=1024, ge=1)
    max_scale: float = Field(default=1.0, gt=0)
    train_embeddings: bool = True
    condition_text: Literal["input", "change"] = "input"
    """"change": "{answer} >> {new answer} || {input}"."""


PAPER = KnowledgeEditorConfig(
    layers=0,
    matrices="all",
    condition_text="change",
    outer_texts="edit",
    flips=1.0,
    edits_per_step=1,
    locality_per_edit=255,
    constrained=True,
    optimiser="rmsprop",
    learning_rate=3e-4,
    warmup=1000,
    decay="linear",
    steps=200_000,
)
FIXED = KnowledgeEditorConfig(hidden=512, condition=768, learning_rate=1e-5)
DEFAULT = KnowledgeEditorConfig(
    hidden=128,
    condition=256,
    max_scale=200.0,
    train_embeddings=False,
    learning_rate=2e-3,
    decay="linear",
    warmup=10,
    clip=1.0,
    outer_texts="any",
    steps=120,
    validation_edits=96,
    validate_every=40,
    patience=120,
    best_by="harmonic",
)

PRESETS = {"paper": PAPER, "fixed": FIXED, "default": DEFAULT}
