"""What a long edit call has worked out so far. Here it is kept nowhere; `checkpoint.Checkpoint` keeps it in a folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """A step's tensors, the seconds it took, and whether it was worked out before."""

    tensors: Tensors
    seconds: float
    kept: bool = False


class Journal:
    """Hands out each step's tensors: made now, or, where a call goes on after an interruption, as they were made then.

    An editor is a procedure in which only reading and training are slow and everything else follows from them. So it runs anew from
    the start when a call goes on, asks for its steps in the same order, and comes to the same result bit for bit.
    """

    def once(self, key: Mapping[str, Any], make: Callable[[], Tensors]) -> Step:
        """The next step. key: which step it is, as JSON, to know it again. Tensors of a step that was kept are on the CPU."""
        begun = time.perf_counter()
        made = make()
        return Step(made, time.perf_counter() - begun)


def known_by(value: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]
