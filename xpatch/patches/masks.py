"""Language masks multiplied into the parts that name them: a set for one language, for servers that name no languages."""

from __future__ import annotations

from dataclasses import replace

from xpatch.errors import MismatchError
from xpatch.patches.forms import LanguageMask, LowRankDelta, Part, PatchNeurons
from xpatch.patches.types import PatchSet


def fold(part: Part, mask: LanguageMask, language: str) -> Part:
    """`part` without a mask, equal to `part` behind `mask` for rows of `language`, to fp32 rounding; unequal for others.

    `inner` goes into keys `[N, D]`, down `[R, D_in]` or the columns of a weight, `outer` into values `[N, D]`, up `[D_out, R]` or the
    weight's rows and bias. A language the mask does not name gets the part as it is, as at serving time.
    """
    if language not in mask.languages:
        return replace(part, mask=None)
    row = mask.languages.index(language)
    inner, outer = mask.inner[row], mask.outer[row]
    if isinstance(part, PatchNeurons):
        return replace(part, keys=part.keys * inner, values=part.values * outer, mask=None)
    if isinstance(part, LowRankDelta):
        return replace(part, down=part.down * inner, up=part.up * outer.unsqueeze(1), mask=None)
    bias = None if part.bias is None else part.bias * outer
    return replace(part, weight=part.weight * inner * outer.unsqueeze(1), bias=bias, mask=None)


def fold_language(patches: PatchSet, language: str) -> PatchSet:
    """`patches` for rows of one language alone: every mask folded into the parts that name it; the ledger stays.

    Rows of other languages are served as if they were of `language`; apply one such set per language and choose it with
    `Rows(patches=[...])`. Raises `MismatchError` where the set has masks and none of them knows the language. Gates
    see what they saw: a part's unmasked input, or what it adds.
    """
    if patches.masks and not any(language in mask.languages for mask in patches.masks.values()):
        known = sorted({code for mask in patches.masks.values() for code in mask.languages})
        raise MismatchError(f"no language mask of the set knows {language!r}; languages: {', '.join(known)}")
    parts = {
        name: part if part.mask is None else fold(part, patches.masks[part.mask], language)
        for name, part in patches.parts.items()
    }
    return replace(patches, parts=parts, masks={})
