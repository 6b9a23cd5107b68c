"""Which language versions decide that an edit is needed and are trained on: all that tells the three methods apart."""

from __future__ import annotations

import random
from collections.abc import Callable

from xpatch.editors.task import Edit, Wording

Sampler = Callable[[Edit, random.Random], tuple[Wording, ...]]


def own_language(edit: Edit, rng: random.Random) -> tuple[Wording, ...]:
    """Transformer-Patcher: the edit as it was written."""
    return edit.versions[:1]
