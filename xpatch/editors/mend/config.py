"""Settings of training MEND.

`paper`: the released settings. Ten edits per step stand for ten accumulated iterations (the reference's very first step sums
eleven); alpha is stepped once with `alpha_rate`, not also with the main rate of 1e-6; steps and patience are a tenth of the
reference's iterations; running statistics survive a resumed training.
`default`: trains in minutes on a small model. A narrower network with a learning rate five hundred times higher; V is drawn so that
U's gradient has the size of one row's; alpha starts at a negative value, which makes the first update a descent.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xpatch.editors.hyper.config import TrainConfig


class MendConfig(TrainConfig):
    """MEND's network and its training."""

    rank: int = Field(default=1920, ge=1)
    spread: float = Field(default=1.0, gt=0)
    """Standard deviation of V's initial values."""
    alpha: float = 1e-4
    """Initial step size of every matrix; its sign is learned."""
    alpha_rate: float = Field(default=1e-4, gt=0)
    normalisation: Literal["running", "layernorm"] = "running"
    epsilon: float = Field(default=1e-5, gt=0)
    """Of the layernorm."""


PAPER = MendConfig(steps=100_000, validate_every=500, patience=2000)
DEFAULT = MendConfig(
    rank=256,
    spread=1 / 16,
    alpha=-1e-3,
    alpha_rate=1e-4,
    learning_rate=5e-4,
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

PRESETS = {"paper": PAPER, "default": DEFAULT}
