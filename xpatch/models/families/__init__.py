"""Families whose FFNs structure alone does not settle: one small file each, all listed here.

A family is a module with `MODEL_TYPES` (values of `config.model_type`) and `sites(model, found)`: what structure found in the
whole model, in; the sites that are right, out. What a family changed or added carries its name in `FFNSite.family`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from xpatch.models.families import albert, llama4, xlm

if TYPE_CHECKING:
    from xpatch.models.anatomy import FFNSite

FAMILIES: tuple[ModuleType, ...] = (albert, llama4, xlm)


def settled(model: nn.Module, found: list[FFNSite]) -> list[FFNSite]:
    """`found` by structure, put right by the families that `model` or a part of it belongs to."""
    types = set(_model_types(model))
    for family in FAMILIES:
        if types.intersection(family.MODEL_TYPES):
            name = family.__name__.rpartition(".")[2]
            before = set(found)
            found = [
                site if site in before else replace(site, family=name) for site in family.sites(model, list(found))
            ]
    return found


def _model_types(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(kind, str):
            yield kind
