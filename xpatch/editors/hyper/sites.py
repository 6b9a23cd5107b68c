"""Which linear layers a hyper-network edits: by structure, the FFN matrices of the last layers. Biases are never edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite, find_ffn_sites
from xpatch.models.linears import linear, linears


@dataclass(frozen=True)
class EditedLinear:
    """One matrix `[D_out, D_in]` a hyper-network changes. name: the dotted path of its layer."""

    name: str
    inside: int
    outside: int

    @property
    def shape(self) -> tuple[int, int]:
        """(D_in, D_out): MEND shares one network between matrices of one shape."""
        return self.inside, self.outside


def edited_linears(
    model: torch.nn.Module, layers: int = 3, matrices: Literal["ffn", "all"] = "ffn"
) -> tuple[EditedLinear, ...]:
    """The linears of the last `layers` layers (0: of all), in the order of computation.

    "ffn": both FFN matrices; of a gated FFN the activated one (T5's `wi_0`, Llama's `gate_proj`) and the down projection, as MEND
    does. "all": every linear inside those layers, attention included (KnowledgeEditor's choice).
    Raises `MismatchError` for a mixture of experts, whose matrices no single edit can name.
    """
    sites = find_ffn_sites(model)
    chosen = sites[-layers:] if layers else sites
    names: dict[str, None] = {}
    for site in chosen:
        if site.kind == "experts":
            raise MismatchError(
                f"FFN {site.name!r} is a mixture of experts; hyper-network editors change single linear layers; "
                "use method 't-patcher' or 'mpn'"
            )
        if matrices == "ffn":
            names |= dict.fromkeys((site.gate or site.up, site.down))
        else:
            block = _block(site)
            names |= dict.fromkeys(found.name for found in linears(model.get_submodule(block), f"{block}."))
    return tuple(EditedLinear(name, *linear(model, name)[1:]) for name in names)


def _block(site: FFNSite) -> str:
    """ "bert.encoder.layer.3" of a site there or below: the layer that holds it."""
    parts = site.name.split(".")
    last = max(index for index, part in enumerate(parts) if part == str(site.layer))
    return ".".join(parts[: last + 1])
