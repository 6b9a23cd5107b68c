"""`export_widened`: patch neurons as a wider FFN in a plain checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.exporters._bare import check_bare
from xpatch.exporters._written import written_together
from xpatch.exporters.checkpoints.compare import check_written
from xpatch.exporters.checkpoints.deltas import changes
from xpatch.exporters.checkpoints.held import held
from xpatch.exporters.checkpoints.note import NOTE_FILE, write_note
from xpatch.models.anatomy import FFNSite, ffn_site, find_ffn_sites
from xpatch.patches.identity import check_fit
from xpatch.patches.types import Part, PatchNeurons

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet

# What configurations call F. GPT-2's n_inner is None for four times the width.
_SETTINGS = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff", "ffn_hidden_size", "inner_dim")


def export_widened(
    model: Any, patches: PatchSet, out: str | Path, *, tokenizer: Any = None, multiple: int = 64, check: bool = True
) -> Path:
    """Write `model` with the neurons of `patches` as further inner units of its FFNs to the folder `out`, and return it.

    model: a Hugging Face model (`PreTrainedModel`) without patches, whose FFNs have no gate and a bias before the activation: BERT, XLM-R,
    DistilBERT, GPT-2, OPT and the like; it is left as it was. patches: neurons of the FFN's own activation, and deltas (folded in), without
    masks and gates. The result is a plain checkpoint with a larger FFN width F in its `config.json`: Transformers, vLLM and SGLang load it
    without xpatch. Layers without neurons are filled up with zeros, and all up to a `multiple` of units.
    check: as in `export_merged`: the written folder is loaded again, a second model in memory, and compared with the patched one.

    The folder appears as a whole or not at all; an earlier export there is replaced. Raises `MismatchError` (a set for another base, gated
    FFNs, other activations, no bias, a class whose configuration cannot name F), `ConflictError` (masks, gates, patches applied to the
    model), `BackendError` (what was written does not compute what the patched model does), `XpatchError` (a folder that holds other things).
    """
    check_bare(model)
    check_fit(patches, model, tokenizer)
    parts = held(patches, ("neurons", "lowrank", "dense"), "a widened checkpoint")
    sites = find_ffn_sites(model)
    wider = {name: [] for name in (site.name for site in sites)}  # type: dict[str, list[PatchNeurons]]
    for name, part in parts.items():
        if isinstance(part, PatchNeurons):
            _check(ffn_site(model, part.site, sites), part, name, model)
            wider[part.site].append(part)
    if not any(wider.values()):
        raise MismatchError(
            "a widened checkpoint: the set has no patch neurons; `xpatch export merged` holds its deltas"
        )
    inner = _common_width(model, sites)
    width = max(inner + sum(part.count for part in found) for found in wider.values())
    width = -(-width // multiple) * multiple
    config = _wider_config(model, sites, inner, width)
    weights = _weights(model, parts, sites, wider, width)
    with written_together(Path(out), NOTE_FILE) as folder:
        with torch.device("meta"):
            shell = type(model)(config)
        shell.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
        shell.save_pretrained(folder, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        write_note(folder, "widened", patches)
        if check:
            check_written(model, patches, folder)
    return Path(out)


def _check(site: FFNSite, part: PatchNeurons, name: str, model: nn.Module) -> None:
    what = f"part {name!r} at {site.name!r}"
    if site.kind != "plain":
        raise MismatchError(
            f"{what}: the FFN is {'a mixture of experts' if site.experts else 'gated'}, so a patch neuron is not one of its inner units; "
            "serve the set with xpatch.apply or ONNX Runtime"
        )
    if site.activation != part.activation:
        raise MismatchError(
            f"{what}: the neurons' activation is {part.activation!r}, the FFN's {site.activation!r}, and one FFN has one activation; "
            f"train with activation={site.activation!r} (preset 'paper'), or serve the set with xpatch.apply or ONNX Runtime"
        )
    if getattr(model.get_submodule(site.up), "bias", None) is None:
        raise MismatchError(
            f"{what}: {site.up!r} has no bias, and a patch neuron needs one; serve the set with xpatch.apply or ONNX Runtime"
        )


def _common_width(model: nn.Module, sites: list[FFNSite]) -> int:
    found = {site.inner for site in sites if site.kind == "plain"}
    if len(found) != 1 or any(site.kind != "plain" for site in sites):
        raise MismatchError(
            f"{type(model).__name__}: expected FFNs of one width without gates, found widths {sorted({site.inner for site in sites})}; "
            "one setting of the configuration could not widen them all"
        )
    return found.pop()


def _wider_config(model: Any, sites: list[FFNSite], inner: int, width: int) -> Any:
    """The model's configuration with F = `width`: the one setting that makes a model with such FFNs."""
    for name in _SETTINGS:
        value = getattr(model.config, name, "absent")
        if value != inner and not (name == "n_inner" and value is None):
            continue
        config = copy.deepcopy(model.config)
        setattr(config, name, width)
        with torch.device("meta"):
            shell = type(model)(config)
        if [(site.name, site.inner) for site in find_ffn_sites(shell)] == [(site.name, width) for site in sites]:
            return config
    raise MismatchError(
        f"{type(model).__name__}: no setting of its configuration makes FFNs of {width} units instead of {inner} "
        f"(looked at {', '.join(_SETTINGS)}); serve the set with xpatch.apply or ONNX Runtime"
    )


def _weights(
    model: nn.Module, parts: Mapping[str, Part], sites: list[FFNSite], wider: Mapping[str, list[PatchNeurons]], width: int
) -> dict[str, torch.Tensor]:  # fmt: skip
    weights = dict(model.state_dict())
    for name, change in changes(model, parts).items():
        weights[name] = change(weights[name].float()).to(weights[name].dtype)
    for site in sites:
        found = wider[site.name]
        more = width - site.inner

        def filled(rows: list[torch.Tensor], like: torch.Tensor, more: int = more) -> torch.Tensor:
            """`rows` one below the other and zeros up to `more` rows, as `like`."""
            made = like.new_zeros((more, *like.shape[1:]))
            if rows:
                made[: sum(map(len, rows))] = torch.cat(rows).to(made)
            return made

        up, down = model.get_submodule(site.up), model.get_submodule(site.down)
        flat = {name: type(module).__name__ == "Conv1D" for name, module in ((site.up, up), (site.down, down))}
        key = f"{site.up}.weight"
        old = weights[key].T if flat[site.up] else weights[key]  # [F, D]
        new = torch.cat((old, filled([part.keys for part in found], old)))
        weights[key] = (new.T if flat[site.up] else new).contiguous()
        if f"{site.up}.bias" in weights:
            old = weights[f"{site.up}.bias"]
            weights[f"{site.up}.bias"] = torch.cat((old, filled([part.bias for part in found], old)))
        key = f"{site.down}.weight"
        old = weights[key] if flat[site.down] else weights[key].T  # [F, D]
        new = torch.cat((old, filled([part.values for part in found], old)))
        weights[key] = (new if flat[site.down] else new.T).contiguous()
    return weights
