"""The four hyper-network methods: their networks, settings and papers, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xpatch.editors.hyper.config import TrainConfig
from xpatch.editors.hyper.network import Blueprint, HyperNetwork
from xpatch.editors.ke import config as ke_config
from xpatch.editors.ke import network as ke
from xpatch.editors.lime import config as lime_config
from xpatch.editors.lime.masks import Masked
from xpatch.editors.mend import config as mend_config
from xpatch.editors.mend import network as mend
from xpatch.errors import FormatError


@dataclass(frozen=True)
class Kind:
    """One method: its training presets, whether an LSTM reads the edit, and whether language masks stand before it."""

    presets: Mapping[str, TrainConfig]
    reads_text: bool
    masked: bool


KINDS: dict[str, Kind] = {
    "ke": Kind(ke_config.PRESETS, reads_text=True, masked=False),
    "mend": Kind(mend_config.PRESETS, reads_text=False, masked=False),
    "lime-ke": Kind(lime_config.KE_PRESETS, reads_text=True, masked=True),
    "lime-mend": Kind(lime_config.MEND_PRESETS, reads_text=False, masked=True),
}


def kind_of(method: str) -> Kind:
    """Raises `FormatError` for a method that needs no trained editor."""
    if method not in KINDS:
        raise FormatError(f"method {method!r} has no editor to train; methods with one: {', '.join(sorted(KINDS))}")
    return KINDS[method]


def network_of(method: str, plan: Blueprint) -> HyperNetwork:
    """A fresh network for `method`."""
    kind = kind_of(method)
    inner: HyperNetwork = ke.build(plan) if kind.reads_text else mend.build(plan)
    if not kind.masked:
        return inner
    return Masked(inner, plan.linears, plan.languages, per_token=not kind.reads_text, seed=plan.seed + 1)


def blueprint(
    method: str, model: Any, linears: Any, languages: tuple[str, ...], settings: Any, seed: int = 0
) -> Blueprint:
    """The plan of a network for `model`."""
    table: torch.Tensor | None = None
    if kind_of(method).reads_text:
        table = model.get_input_embeddings().weight.detach().float()
    return Blueprint(tuple(linears), languages, table, settings, seed)
