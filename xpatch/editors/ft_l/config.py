"""Settings of FT-L, the norm-constrained fine-tuning of the ROME paper (Meng et al. 2022, section 3.1 and appendix E.1).

- `paper`: ROME's settings for GPT-2 XL: Adam 5e-4, no weight decay, at most 25 steps, none once the loss is below 1e-2, and after each step
  every weight is put back within 5e-4 of where it was (the L-infinity box of Zhu et al. 2020). `gpt2-large`, `gpt2-medium` and
  `gpt-j` are the boxes published for those.
- `default`: the box, the rate and the steps chosen on validation facts, and the KL divergence from the answers before editing on memory
  rows of all languages. In the published box the bundled verifier flips no edit, in wider ones without that term all answers drift.

What is done otherwise than in the reference, in every preset:
- the layer is the final FFN's, where a classifier's answer is made; theirs is layer 0, found for GPT-2 and GPT-J (`layer=0` gives it);
- the loss is the cross entropy of the classifier's answer, in a language model that of each token of the target under teacher forcing; theirs
  reads every target token at the last position of the prompt;
- only the weight is trained. The reference picks parameters by a part of their name and so trains and boxes GPT-2's bias as well;
- an edit that is right already is left alone, as everywhere here; the reference trains whatever it is given until the loss is small;
- the reference edits the base afresh each time. Here edits follow one another, each with a fresh optimiser, and the box stays around the
  base's weights: it bounds what all edits together change, so that later ones find less room.
"""

from __future__ import annotations

from pydantic import Field

from xpatch.editors.rows import SampledConfig, by_languages


class ConstrainedConfig(SampledConfig):
    """How one down-projection is trained."""

    layer: int | None = None
    """Which FFN, counted as `xpatch inspect` lists them (negative: from the end); None: the final one, whose rows are read only once."""
    learning_rate: float = Field(default=5e-4, gt=0)
    steps: int = Field(default=25, ge=1)
    enough: float = Field(default=1e-2, ge=0)
    """Training of an edit stops when its loss is below this."""
    box: float | None = Field(default=5e-4, gt=0)
    """Largest change of a single weight; None: no limit."""


PAPER = ConstrainedConfig()
DEFAULT = ConstrainedConfig(
    learning_rate=2e-4,
    steps=50,
    box=5e-3,
    memory_languages="all",
    memory_rows=12_000,
    memory_per_step=128,
    memory_weight=5.0,
)

PRESETS = {
    "paper": PAPER,
    "default": DEFAULT,
    "gpt2-large": PAPER.model_copy(update={"box": 1e-3}),
    "gpt2-medium": PAPER.model_copy(update={"box": 2e-3}),
    "gpt-j": PAPER.model_copy(update={"box": 5e-5}),
    **by_languages(DEFAULT),
}
