"""Which language versions decide that an edit is needed and are trained on: the papers' three choices, for every editor.

MPN (Si et al. 2024, section 3.3, eq. 9) changes nothing of Transformer-Patcher but this, and expects it to help other editors as well:
`train_languages` of the fine-tuning family is that claim as a setting.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Literal

from xpatch.editors.task import Edit, Wording

Sampler = Callable[[Edit, random.Random], tuple[Wording, ...]]
TrainLanguages = Literal["own", "one", "all"]


def own_language(edit: Edit, rng: random.Random) -> tuple[Wording, ...]:
    """Transformer-Patcher: the edit as it was written."""
    return edit.versions[:1]


def one_parallel(edit: Edit, rng: random.Random) -> tuple[Wording, ...]:
    """MPN (only), a weak correspondence: the edit's own language and one other, drawn uniformly; needed where either is wrong."""
    return edit.versions[:1] + tuple(rng.sample(edit.versions[1:], min(1, len(edit.versions) - 1)))


def all_parallel(edit: Edit, rng: random.Random) -> tuple[Wording, ...]:
    """MPN (all), the full correspondence of LiME: every language version; needed where any is wrong. That it also trains on all
    of them is not said in the paper, but its zh and ar figures are out of reach with one sampled language."""
    return edit.versions


SAMPLERS: Mapping[TrainLanguages, Sampler] = {"own": own_language, "one": one_parallel, "all": all_parallel}
