"""A folder made to do harm touches no model, and a signature covers all that could."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import xpatch
from xpatch.errors import FormatError
from xpatch.patches import store
from xpatch.patches.config import PatchConfig
from xpatch.patches.types import PatchNeurons, PatchSet

MakeSet = Callable[..., PatchSet]


def test_no_model_is_touched(bert: torch.nn.Module, folder: Path, make_set: MakeSet) -> None:
    xpatch.apply(bert, make_set(["live"]), name="live")
    ids = torch.tensor([[1, 2, 3]])
    before, weights = bert(ids).logits, {name: value.clone() for name, value in bert.state_dict().items()}
    place = folder / store.CONFIG_FILE
    place.write_text(
        place.read_text(encoding="utf-8").replace('"neurons.0": [0]', '"neurons.0": [1]'), encoding="utf-8"
    )
    try:
        with pytest.raises(FormatError):
            xpatch.apply(bert, xpatch.load(folder), name="live")
        assert xpatch.status(bert).names == ("live",) and torch.equal(bert(ids).logits, before)
        assert all(torch.equal(weights[name], value) for name, value in bert.state_dict().items())
    finally:
        xpatch.remove(bert)


def test_the_fingerprint_covers_every_field_but_four(make_set: MakeSet) -> None:
    """What a signature does not cover, in full: a new field of the format must be decided on here."""
    uncovered = {"written_by", "fingerprint", "name"}
    assert set(PatchConfig.model_fields) - uncovered == {"format_version", "base", "parts", "masks", "gates", "edits"}
    part = PatchNeurons("s", torch.ones(1, 2), torch.ones(1), torch.ones(1, 2), "relu")
    with_base = PatchSet({"p": part})
    assert with_base.fingerprint == PatchSet({"p": part}, name="other").fingerprint
