"""MPN's two samplers (section 3.3, eq. 9): the patch neuron is trained on the English example and its parallel examples."""

from __future__ import annotations

import random

from xpatch.editors.task import Edit, Wording


def one_parallel(edit: Edit, rng: random.Random) -> tuple[Wording, ...]:
    """MPN (only): the edit's own language and one other, drawn uniformly; needed where either is wrong."""
    return edit.versions[:1] + tuple(rng.sample(edit.versions[1:], min(1, len(edit.versions) - 1)))


def all_parallel(edit: Edit, rng: random.Random) -> tuple[Wording, ...]:
    """MPN (all): every language version; needed where any is wrong. That it also trains on all of them is not said in the
    paper, but its zh and ar figures are out of reach with one sampled language."""
    return edit.versions
