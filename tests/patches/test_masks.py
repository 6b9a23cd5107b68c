"""Folding a language's mask into a part gives what the runtime gives a row of that language."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xpatch
from tests.patches.conftest import SITE
from xpatch.patches.masks import fold_language

MASK = xpatch.LanguageMask(("en", "zh"), torch.rand(2, 8) + 0.5, torch.rand(2, 8) + 0.5)
WIDE = xpatch.LanguageMask(("en", "zh"), torch.rand(2, 16) + 0.5, torch.rand(2, 8) + 0.5)
PARTS = {
    "neurons": xpatch.PatchNeurons(SITE, torch.randn(3, 8), torch.randn(3), torch.randn(3, 8), "relu", mask="m"),
    "low-rank": xpatch.LowRankDelta(f"{SITE}.output.dense", torch.randn(2, 16), torch.randn(8, 2), mask="m"),
    "dense": xpatch.DenseDelta(f"{SITE}.output.dense", torch.randn(8, 16), torch.randn(8), mask="m"),
    "without a bias": xpatch.DenseDelta(f"{SITE}.output.dense", torch.randn(8, 16), mask="m"),
}


def answer(model: Any, patches: xpatch.PatchSet, language: str) -> torch.Tensor:
    xpatch.apply(model, patches, name="p")
    try:
        with torch.no_grad(), xpatch.rows(languages=language):
            return model(input_ids=torch.arange(12).view(2, 6)).logits
    finally:
        xpatch.remove(model)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_folded_part_is_the_part_behind_its_mask(bert: Any, kind: str, language: str) -> None:
    masked = xpatch.PatchSet({"p": PARTS[kind]}, masks={"m": MASK if kind == "neurons" else WIDE})
    folded = fold_language(masked, language)
    assert not folded.masks and folded.parts["p"].mask is None and folded.parts["p"].form == PARTS[kind].form
    torch.testing.assert_close(answer(bert, folded, language), answer(bert, masked, language), rtol=1e-5, atol=1e-5)
    other = answer(bert, masked, {"en": "zh", "zh": "en"}[language])
    assert float((answer(bert, folded, language) - other).abs().max()) > 1e-4


def test_what_cannot_be_folded_is_said(bert: Any) -> None:
    masked = xpatch.PatchSet({"p": PARTS["neurons"]}, masks={"m": MASK})
    with pytest.raises(xpatch.MismatchError, match="'sw'.*en, zh"):
        fold_language(masked, "sw")
    plain = fold_language(masked, "en")
    assert fold_language(plain, "sw").tensors.keys() == plain.tensors.keys()  # nothing to fold: nothing to refuse


def test_a_part_whose_mask_does_not_know_the_language_stays_as_it_is() -> None:
    two = {"m": MASK, "n": xpatch.LanguageMask(("de",), torch.rand(1, 8), torch.rand(1, 8))}
    other = xpatch.PatchNeurons(SITE, torch.randn(1, 8), torch.randn(1), torch.randn(1, 8), "gelu", mask="n")
    folded = fold_language(xpatch.PatchSet({"p": PARTS["neurons"], "q": other}, masks=two), "zh")
    assert torch.equal(folded.parts["q"].keys, other.keys) and folded.parts["q"].mask is None
    assert not torch.equal(folded.parts["p"].keys, PARTS["neurons"].keys)
