"""A model with the side path of every patch, in the reference maths: what the exports are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from xpatch.models.anatomy import ffn_site
from xpatch.models.surgery import Surgery
from xpatch.ops import reference
from xpatch.patches.types import LanguageMask, LowRankDelta, Part, PatchNeurons, PatchSet


@contextlib.contextmanager
def side_paths(model: nn.Module, patches: PatchSet, language: str | None = None) -> Iterator[None]:
    """`model` with the side path of every part for a while; gates are not known here. language: that of all rows, for masks.

    x `[..., D]` is read in fp32 and the delta rounded to y's dtype. Independent of the runtime, whose kernels are tested by this.
    """
    seen: dict[str, torch.Tensor] = {}
    with Surgery() as surgery:
        for name, part in patches.parts.items():
            site = ffn_site(model, part.site) if isinstance(part, PatchNeurons) else None
            reads, adds = (site.up, site.down) if site else (part.site, part.site)
            mask = patches.masks[part.mask] if part.mask else None
            surgery.before(model.get_submodule(reads), lambda module, args, name=name: seen.__setitem__(name, args[0]))
            surgery.after(
                model.get_submodule(adds),
                lambda module, args, y, name=name, part=part, mask=mask: (
                    y + _delta(part, mask, seen[name].float(), language).to(y.dtype)
                ),
            )
        yield


def _delta(part: Part, mask: LanguageMask | None, x: torch.Tensor, language: str | None) -> torch.Tensor:
    tensors = {name: tensor.to(x.device) for name, tensor in part.tensors.items()}
    row = mask.languages.index(language) if mask is not None and language in mask.languages else None
    if mask is not None and row is not None:
        x = x * mask.inner[row].to(x.device)
    if isinstance(part, PatchNeurons):
        delta = reference.patch_ffn(x, tensors["keys"], tensors["bias"], tensors["values"], part.activation)
    elif isinstance(part, LowRankDelta):
        delta = reference.lowrank(x, tensors["down"], tensors["up"])
    else:
        delta = reference.dense(x, tensors["weight"], tensors.get("bias"))
    return delta if mask is None or row is None else delta * mask.outer[row].to(x.device)
