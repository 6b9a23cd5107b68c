"""Settings of editing with a trained hyper-network, and of its training; each method's own file adds what its network needs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from xpatch.editors.presets import Config

Languages = Literal["own", "all"] | tuple[str, ...]


def _as_text(value: Any) -> Any:
    return str(value) if hasattr(value, "__fspath__") else value


class HyperEditConfig(Config):
    """How a trained editor is used."""

    editor: Annotated[str | None, BeforeValidator(_as_text)] = None
    """Folder `xpatch.train_editor` wrote."""
    decide: Literal["own", "all"] = "own"
    """The versions that decide whether an edit is needed and right: the one in the request's language, or every one given."""
    edit_right: bool = False
    """Edit what is right already, too (the papers draw edits without asking)."""
    keep_failed: bool = False
    """Keep the change of an edit that is not right even alone (the papers do); else it owns nothing."""
    batch_size: int = Field(default=16, ge=1)
    """Edits whose gradients are taken in one pass; each is made from the base alone."""


EDIT_PRESETS = {"default": HyperEditConfig(), "paper": HyperEditConfig(edit_right=True, keep_failed=True)}


class TrainConfig(Config):
    """How a hyper-network is trained. One step draws `edits_per_step` edits, each tried out on the base alone."""

    layers: int = Field(default=3, ge=0)
    """The last so many layers are edited; 0: all."""
    matrices: Literal["ffn", "all"] = "ffn"

    edit_languages: Languages = "own"
    """Languages of the edit's input: the request's "own", "all", or a list."""
    outer_languages: Languages = "own"
    """Languages in which the edit must hold and other texts must stay: that of the edit's input ("own"), "all", or a list."""
    outer_texts: Literal["edit", "rephrase", "any"] = "rephrase"
    """In the language of the input: that text itself, one of its rephrases (where there are some), or any of them. In another
    language "edit" and "rephrase" mean its canonical wording."""
    flips: float | None = Field(default=0.5, ge=0, le=1)
    """Share of edits that ask for another label than the base's answer, drawn uniformly; the others ask for that answer. None: the
    requests' own targets."""
    locality_per_edit: int = Field(default=1, ge=1)

    edit_weight: float = Field(default=0.1, ge=0)
    locality_weight: float = Field(default=1.0, ge=0)
    constrained: bool = False
    """KnowledgeEditor's Lagrangian in the place of the two weights: `NLL + λ (KL - m)`."""
    multiplier_rate: float = Field(default=0.1, ge=0)
    margin: float = Field(default=0.1, ge=0)
    margin_floor: float = Field(default=1e-3, ge=0)

    edits_per_step: int = Field(default=10, ge=1)
    accumulate: int = Field(default=1, ge=1)
    """A step's edits are worked off in so many passes."""
    optimiser: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = Field(default=1e-6, gt=0)
    warmup: int = Field(default=0, ge=0)
    decay: Literal["none", "linear"] = "none"
    """"linear": the learning rates fall to zero at the last step."""
    clip: float = Field(default=100.0, gt=0)
    steps: int = Field(default=100_000, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the base's forward and backward passes (autocast); the network itself stays in fp32."""

    validation_share: float = Field(default=0.1, gt=0, lt=1)
    """Of the requests, where no validation requests are given."""
    validation_edits: int = Field(default=500, ge=1)
    validate_every: int = Field(default=500, ge=1)
    patience: int = Field(default=2000, ge=1)
    """Stop after so many steps without a better validation."""
    best_by: Literal["loss", "harmonic"] = "loss"
    """The best checkpoint has the lowest total loss, or the highest harmonic mean of edits right and answers unchanged."""


class MaskConfig(Config):
    """LiME's part of a training."""

    mask_rate: float = Field(default=1e-3, gt=0)
    l0_weight: float = Field(default=0.0, ge=0)
    """Weight of the masks' L0. The released code reads a detached copy, so its weight of 1 acts as 0."""
