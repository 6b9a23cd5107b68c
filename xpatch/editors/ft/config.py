"""Settings of fine-tuning the final FFN.

The MPN paper says only that its baseline "edits the last FFN layer and uses cross-entropy loss as a constraint". What it leaves open:
- `paper`: Transformer-Patcher's own fine-tuning baseline (Adam 1e-5, a fresh optimiser for every edit, until the edit is right, at
  most 2000 steps, one after the other), restricted to the two linears of the FFN with their biases; without dropout, its 8 copies
  of the example equal one. No term holds other answers.
- `default`: the same with the baseline's optional term, the KL divergence from the answers before editing on memory rows (weight
  1; 64 rows drawn for each step instead of 512 fixed ones and past edits).
- `rmsprop`: the optimiser of the MEND, LiME and XME baselines (RMSprop 5e-6, gradient norm 100, at most 100 steps), but sequential;
  theirs start every edit afresh.
- `one`, `all`: the default with MPN's samplers, which the MPN paper expects to help other editors too. The others train on the request's
  own language.

A language model's edit is one row for each token of its target, under teacher forcing, and is right where all are and greedy decoding says
the target; the memory's rows are tokens too. The settings are the classifiers'.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xpatch.editors.rows import SampledConfig, by_languages


class FineTuneConfig(SampledConfig):
    """How the FFN's two linears are trained."""

    optimiser: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = Field(default=1e-5, gt=0)
    clip: float = Field(default=0.0, ge=0)
    """Largest gradient norm; 0: no limit."""
    steps: int = Field(default=2000, ge=1)
    """At most this many steps per edit; an edit that is right costs none."""
    rank: int | None = Field(default=None, ge=1)
    """Store each weight's change as a low-rank delta, cut by its singular values after training; None: the dense change, exactly. With a
    rank the biases are not trained: no form of a patch holds a bias alone in few numbers."""


PAPER = FineTuneConfig()
DEFAULT = FineTuneConfig(memory_weight=1.0)
RMSPROP = FineTuneConfig(optimiser="rmsprop", learning_rate=5e-6, clip=100.0, steps=100)

PRESETS = {"paper": PAPER, "default": DEFAULT, "rmsprop": RMSPROP, **by_languages(DEFAULT)}
