"""What a long edit call has trained so far. Here it is kept nowhere; `checkpoint.Checkpoint` keeps it in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


class Journal:
    """Hands out each step's tensors: made now, or, where a call goes on after an interruption, as they were made then.

    An editor is a procedure in which only its training is slow and everything else follows from what was trained. So it runs anew from
    the start when a call goes on, asks for its steps in the same order, and comes to the same result bit for bit.
    """

    stage = "training"
    """What to call the progress: "resuming" after a step that was made before."""

    def once(self, key: Mapping[str, Any], make: Callable[[], Tensors]) -> tuple[Tensors, float]:
        """The tensors of the next step and the seconds it took. key: which step it is, as JSON, to know it again."""
        begun = time.perf_counter()
        made = make()
        return made, time.perf_counter() - begun
