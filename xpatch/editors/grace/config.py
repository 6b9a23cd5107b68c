"""Settings of GRACE (Hartvigsen et al. 2023, Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors).

- `paper`: the published settings: radius 1, values from U[0, 1), 100 steps of Adam at rate 1, the value in place of the layer's output,
  a ball that meets a like label grows just to the new row ("coverage").
- `default`: radii from the memory: a ball reaches a share of the way to the nearest memory row or row of an edit to another label,
  never further, also when it grows (where it may not grow that far, a key is added); the value is added to the FFN's output, starts at 0
  and answers for every text that shares it; an edit is gone through again while it is wrong, its rephrases as well. Then single edits can
  be taken out.

What is done otherwise than in the reference, in both:
- the layer is the final FFN, with its input as the key and its output as the value's place; theirs is one linear layer, in its BERT
  experiment the down-projection of layer 10 of 12, with the FFN's inner activations as keys;
- a text is gone through when its answer is wrong, as everywhere here; their loop checks that outside the editor;
- the codebook acts on each row whose own nearest key is near enough; theirs asks the row of the last token and replaces the rows before
  it. A classifier's head reads one row, so that its answer is the same;
- two edits of one text to different labels share a key and the later one wins; theirs adds a second key at distance 0 and shuts both.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xpatch.editors.rows import SampledConfig, by_languages


class GraceConfig(SampledConfig):
    """How the codebook grows and its values are trained."""

    radius: float = Field(default=1.0, gt=0)
    """A new key's radius, in units of the FFN's input; where `memory_share` decides instead, the radius without any memory."""
    memory_share: float | None = Field(default=None, gt=0, lt=1)
    """A ball reaches at most this share of the distance to the nearest row that must keep or get another answer. At one half, balls of
    two labels never meet."""
    place: Literal["replace", "add"] = "replace"
    """The value stands in place of the FFN's output, or is added to it. The first needs a second part that takes the FFN's output away: a
    copy of its weights, which only a plain FFN allows and which binds all edits together."""
    start: Literal["cold", "warm"] = "cold"
    """A value starts from U[0, 1), or from what the FFN gives (which is 0 where it is added)."""
    learning_rate: float = Field(default=1.0, gt=0)
    steps: int = Field(default=100, ge=1)
    enough: float = Field(default=0.0, ge=0)
    """Training of a value stops when its loss is below this."""
    replay: bool = False
    """Train a value that several texts share on all of them, not on the newest alone."""
    rounds: int = Field(default=1, ge=1)
    """How often an edit is gone through while it is still wrong."""


PAPER = GraceConfig()
DEFAULT = GraceConfig(
    rephrases=True,
    memory_share=0.5,
    memory_rows=12_000,
    place="add",
    start="warm",
    learning_rate=0.1,
    steps=200,
    enough=1e-2,
    replay=True,
    rounds=3,
)

PRESETS = {"paper": PAPER, "default": DEFAULT, **by_languages(DEFAULT)}
