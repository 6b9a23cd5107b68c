"""Whether a language model says what it was taught: greedy decoding has the last word on an edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xpatch.editors.task import Decoding, Wording
from xpatch.patches.jsonl import shorten

SAYS = ", greedy decoding says the target"


def unsaid(
    decoding: Decoding | None,
    asked: Sequence[tuple[int, Wording]],
    added: Callable[[torch.Tensor], torch.Tensor],
) -> dict[int, str]:
    """Edits, by number, whose target greedy decoding does not say, and what it says. added: what the edits add to the FFN's output, x
    `[M, D]` -> `[M, D]`. Nothing for a classifier (`decoding` is None)."""
    if decoding is None:
        return {}
    said = decoding.instead([wording for _, wording in asked], added)
    return {
        edit: f"right token by token, but greedy decoding says {shorten(repr(instead))} in {wording.language}"
        for (edit, wording), instead in zip(asked, said, strict=True)
        if instead is not None
    }
