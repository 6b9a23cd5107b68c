"""ALBERT (Lan et al. 2020): all layers share one group of weights, so one FFN runs several times in a forward.

The shared module is the site. A patch beside it acts on every pass, as editing the shared weights would; there is no place
for a patch at one pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from xpatch.models.anatomy import FFNSite

MODEL_TYPES = ("albert",)
GROUPS = "albert_layer_groups."


def sites(model: nn.Module, found: list[FFNSite]) -> list[FFNSite]:
    """As found, with how often each is used: layer i of `num_hidden_layers` belongs to group ⌊i · groups / layers⌋."""
    return list(_counted(model, found))


def _counted(model: nn.Module, found: list[FFNSite]) -> Iterator[FFNSite]:
    for site in found:
        prefix, groups, rest = site.name.partition(GROUPS)
        if not groups:
            yield site
            continue
        config: Any = model.get_submodule(prefix.rstrip(".")).config
        layers, count = int(config.num_hidden_layers), int(config.num_hidden_groups)
        group = int(rest.split(".")[0])
        yield replace(site, uses=sum(layer * count // layers == group for layer in range(layers)))
