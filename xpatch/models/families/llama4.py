"""Llama 4: the mixture block returns a pair, its output being the shared expert's plus the routed sum.

The shared expert reads the block's input and nothing scales its output: what is added to it is added to the block's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from xpatch.models.anatomy import FFNSite

MODEL_TYPES = ("llama4", "llama4_text")


def sites(model: nn.Module, found: list[FFNSite]) -> list[FFNSite]:
    """Mixtures join at `shared_expert`."""
    return [
        replace(site, up=f"{site.name}.shared_expert", down=f"{site.name}.shared_expert") if site.experts else site
        for site in found
    ]
