"""The named places of an exported graph that patches go to.

Axes: `D` width, `N` neurons, `R` rank, `L` languages of a mask, `S` rows of a call (or 1). Every tensor of a slot is a graph
input that is also an initializer, hence optional: with nothing fed the graph computes the base model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

#: Unused optional input under which an adapter carries its name, fingerprint and ledger: uint8 `[bytes]`.
META = "xpatch_meta"
#: Which row of the language masks each row of the batch gets: int64 `[S]`, default `[0]`, the row of ones; so
#: does every number a mask has no row for.
LANGUAGE = "xpatch_language"

Dims = tuple[int | str, ...]


class SlotTensor(NamedTuple):
    """One optional graph input: its name, dtype, dimensions (a string is dynamic, minimum 0) and what it is when not fed."""

    name: str
    dims: Dims
    default: np.ndarray[Any, Any]


class Slot(BaseModel):
    """Where patches join the graph, and under which names.

    kind "neurons": keys `[D, N]`, bias `[N]`, values `[N, D]` beside the FFN `site`. kind "lowrank": down `[D_in, R]`, up
    `[R, D_out]` beside the linear layer `site`. Both: select `[S, N or R]` (ones `[1, 1]` by default), which of them each row
    of the batch gets. With `masked`: mask_inner `[L, D_in]`, mask_outer `[L, D_out]` (one row of ones by default).
    The tensors' names are `prefix` + "_" + these keys. graph: which graph of the exported folder holds the slot.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["neurons", "lowrank"]
    site: str
    prefix: str
    reads: str = Field(description="module whose input is x")
    adds: str = Field(description="module to whose output the patches add")
    width_in: int
    width_out: int
    activation: str | None = None
    masked: bool = True
    graph: str = "model"

    @property
    def weights(self) -> tuple[str, str]:
        """Keys of the tensors before and after the activation."""
        return ("keys", "values") if self.kind == "neurons" else ("down", "up")

    def name(self, key: str) -> str:
        """Graph input name of one tensor of this slot."""
        return f"{self.prefix}_{key}"

    @property
    def tensors(self) -> dict[str, SlotTensor]:
        """Every tensor of the slot by key, in the order of the graph inputs."""
        first, last = self.weights
        count = self.name("n" if self.kind == "neurons" else "r")
        found: dict[str, tuple[Dims, np.ndarray[Any, Any]]] = {
            first: ((self.width_in, count), _zeros(self.width_in, 0)),
            last: ((count, self.width_out), _zeros(0, self.width_out)),
            "select": ((self.name("rows"), self.name("selected")), np.ones((1, 1), np.float32)),
        }
        if self.kind == "neurons":
            found["bias"] = ((count,), _zeros(0))
        if self.masked:
            languages = self.name("languages")
            found["mask_inner"] = ((languages, self.width_in), np.ones((1, self.width_in), np.float32))
            found["mask_outer"] = ((languages, self.width_out), np.ones((1, self.width_out), np.float32))
        return {key: SlotTensor(self.name(key), dims, default) for key, (dims, default) in found.items()}


def prefixes(sites: Iterable[str]) -> list[str]:
    """A lower-case graph name for each site, no two alike: "bert.encoder.layer.3" -> "xpatch_bert_encoder_layer_3"."""
    found: list[str] = []
    for site in sites:
        plain = "xpatch_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in site.lower())
        name, number = plain, 2
        while name in found:
            name, number = f"{plain}_{number}", number + 1
        found.append(name)
    return found


def _zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)
