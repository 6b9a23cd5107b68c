"""Settings of `mpn-masked`: MPN's, and those of the masks."""

from __future__ import annotations

from pydantic import Field

from xpatch.editors.mpn.config import DEFAULT as MPN
from xpatch.editors.mpn.config import PAPER as MPN_PAPER
from xpatch.editors.t_patcher.config import NeuronConfig


class MaskedConfig(NeuronConfig):
    """How masks are learned before the neurons are."""

    mask_edits: int = Field(default=256, ge=1)
    """Masks are learned on at most so many edits: the first that are wrong somewhere and have versions in two languages or more."""
    mask_least: int = Field(default=8, ge=1)
    """With fewer such edits every mask stays neutral, and the result is MPN's."""
    mask_steps: int = Field(default=150, ge=1)
    mask_rate: float = Field(default=2e-2, gt=0)
    """Adam's learning rate for the masks; it falls as the neurons' does."""
    mask_shrink: float = Field(default=0.0, ge=0)
    """Weight of ‖mask - 1‖², summed over languages, beside the mean loss of an edit."""
    fold: str | None = None
    """A language whose mask is multiplied into the keys, for a server that names no languages: the set then suits that language."""


DEFAULT = MaskedConfig(**MPN.model_dump())

# There is no paper of this method: MPN's paper preset behind the masks.
PAPER = MaskedConfig(**MPN_PAPER.model_dump())

PRESETS = {"paper": PAPER, "default": DEFAULT}
