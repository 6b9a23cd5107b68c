"""XLM and FlauBERT (Lample and Conneau 2019): attentions and FFNs are kept in two lists, `attentions` and `ffns`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from xpatch.models.activations import activation_of
from xpatch.models.linears import linear_shape

if TYPE_CHECKING:
    from xpatch.models.anatomy import FFNSite

MODEL_TYPES = ("xlm", "flaubert")


def sites(model: nn.Module, found: list[FFNSite]) -> list[FFNSite]:
    """Those found elsewhere, and each element of a list `ffns` that has an attention at its place in `attentions`."""
    from xpatch.models.anatomy import FFNSite

    added = []
    for path, module in model.named_modules():
        ffns, attentions = getattr(module, "ffns", None), getattr(module, "attentions", None)
        if not isinstance(ffns, nn.ModuleList) or not isinstance(attentions, nn.ModuleList):
            continue
        stack = "decoder" if getattr(module, "causal", False) else "encoder"
        for layer in range(min(len(ffns), len(attentions))):
            name = f"{path}.ffns.{layer}" if path else f"ffns.{layer}"
            ffn: Any = ffns[layer]
            shape = linear_shape(ffn.lin1)
            if shape is not None:
                activation = activation_of(ffn, model)
                added.append(
                    FFNSite(name, layer, f"{name}.lin1", f"{name}.lin2", None, activation, *shape, stack=stack)
                )
    return [*found, *added]
