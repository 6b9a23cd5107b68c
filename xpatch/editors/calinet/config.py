"""Settings of CaliNet (Dong et al. 2022, Calibrating Factual Knowledge in Pretrained Language Models).

- `paper`: the training script published with the paper (T5-base, 100 facts): 64 slots beside the last FFN, without biases, through the FFN's
  own activation; learning rate 1e-2, 5000 steps, 2048 texts a step; every fact with its paraphrases, and nothing that holds other answers.
- `default`: slots with a ReLU gate, a bias and values that start at 0, and the KL divergence from the answers before editing on memory
  rows of all languages, all chosen on validation facts.

What is done otherwise than in the reference, in both:
- a fact is calibrated when the model's answer to it is wrong; theirs compares the scores of the fact and of false variants, for generation;
- Adam; theirs is Adafactor with a fixed rate and 100 steps of warm-up;
- answers that are right already count as memory where there is a memory term.
The paper does not say how slots start: `paper` takes torch's own start of linear layers, without biases.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xpatch.editors.rows import SampledConfig, by_languages


class CaliNetConfig(SampledConfig):
    """How the slots are trained."""

    slots: int = Field(default=64, ge=1)
    """Calibration memory slots, whatever the number of edits."""
    activation: Literal["ffn", "relu", "gelu", "gelu_tanh", "silu"] = "ffn"
    """The slots' gate; "ffn" is the FFN's own activation."""
    bias: bool = False
    silent: bool = False
    """Values start at 0, so that training begins with the model as it is."""
    rephrases: bool = True
    learning_rate: float = Field(default=1e-2, gt=0)
    learning_rate_end: float = Field(default=1.0, gt=0)
    """The learning rate falls linearly to this share of itself at the last step."""
    steps: int = Field(default=5000, ge=1)
    batch: int = Field(default=2048, ge=1)
    """Texts in each step, drawn anew; all of them where there are fewer."""


PAPER = CaliNetConfig()
DEFAULT = CaliNetConfig(
    activation="relu",
    bias=True,
    silent=True,
    learning_rate=3e-3,
    learning_rate_end=0.1,
    steps=1000,
    memory_languages="all",
    memory_rows=12_000,
    memory_per_step=256,
    memory_weight=5.0,
)

PRESETS = {"paper": PAPER, "default": DEFAULT, **by_languages(DEFAULT)}
