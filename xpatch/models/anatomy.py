"""Finding the FFNs of a transformer by structure: in each block, the pair of linear layers `D -> F -> D` outside attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.activations import activation_of
from xpatch.models.experts import experts_in, is_experts
from xpatch.models.linears import Linear, linear, linear_shape, linears
from xpatch.models.names import near, some

__all__ = ["FFNSite", "ffn_site", "final_ffn", "find_ffn_sites", "linear", "linear_shape", "linears"]

_ATTENTION = ("attention", "attn")
_RECURRENCE = ("mamba", "ssm", "temporal_block")  # stand where attention does in other layers of the same model
_SENSES = ("vision", "visual", "image", "audio", "speech")


@dataclass(frozen=True)
class FFNSite:
    """One FFN. `y = down(act(up(x)))`, or `down(act(gate(x)) * up(x))`, or a mixture of such; x and y are `[..., D]`.

    name: dotted path of the module that holds both linears (`PatchNeurons.site`): BERT "bert.encoder.layer.3", GPT-2
    "transformer.h.3.mlp". up: dotted name of the module whose input is x; down: of the module whose output is y. Both are
    linears, but in a mixture of experts, where patches join the block as a whole: there both are the same module.
    gate: None in an ungated FFN, `up` where one linear computes both. activation: one of `xpatch.patches.types.ACTIVATIONS`,
    or the model's own name for another one. layer: index in its stack. width: D. inner: F, of one expert in a mixture (0 where
    that was not found). stack: "encoder", "decoder", a sense ("vision", "audio" ...) or "" (no sign of either). experts: how many (0: not a
    mixture). uses: how often one forward runs this FFN (more than once where layers share it: a patch acts every time).
    family: name of the file in `xpatch.models.families` that decided, None where structure did.
    """

    name: str
    layer: int
    up: str
    down: str
    gate: str | None
    activation: str
    width: int
    inner: int
    stack: str = ""
    experts: int = 0
    uses: int = 1
    family: str | None = None

    @property
    def kind(self) -> Literal["plain", "gated", "experts"]:
        """How it computes: two linears, two and a gate, or a mixture of experts."""
        return "experts" if self.experts else "gated" if self.gate else "plain"


def find_ffn_sites(model: nn.Module) -> list[FFNSite]:
    """Every FFN of `model`, in the order of its layers (an encoder's before a decoder's). Needs no weights, only shapes.

    A mixture of experts is one FFN: its block as a whole. Blocks with several FFNs of one size give no site.
    Raises `MismatchError` with what was found when there is no site at all.
    """
    from xpatch.models.families import settled

    sites = settled(model, list(_walk(model, "", model)))
    if not sites:
        raise MismatchError(
            f"no FFN was found in {type(model).__name__}: expected blocks in an nn.ModuleList, each with attention and "
            f"two linear layers D -> F -> D outside it; found {_describe(model)}. Only such models can hold patch neurons; "
            "deltas can stand beside any linear layer"
        )
    return sites


def final_ffn(model: nn.Module) -> FFNSite:
    """The last FFN in the order of computation: where Transformer-Patcher and MPN append their neurons."""
    sites = find_ffn_sites(model)
    return next((site for site in reversed(sites) if site.stack not in _SENSES), sites[-1])


def ffn_site(model: nn.Module, name: str, sites: list[FFNSite] | None = None) -> FFNSite:
    """The FFN called `name` (of `sites`, where they were found before). Raises `MismatchError` listing the nearest names."""
    sites = find_ffn_sites(model) if sites is None else sites
    for site in sites:
        if site.name == name:
            return site
    raise MismatchError(
        f"{type(model).__name__} has no FFN named {name!r}; it has {near(name, [site.name for site in sites])}. "
        "`xpatch inspect --model DIR` lists them"
    )


def _walk(module: nn.Module, prefix: str, model: nn.Module) -> Iterator[FFNSite]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        # Blocks of one list may differ (attention here, a recurrence there); a list without any attention holds no layers.
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and any(_attends(block) for block in child):
            sites = [_site_in(block, f"{path}.{index}", index, model) for index, block in enumerate(child)]
            if any(sites):
                yield from (site for site in sites if site is not None)
                continue
        yield from _walk(child, f"{path}.", model)


def _site_in(block: nn.Module, path: str, layer: int, model: nn.Module) -> FFNSite | None:
    mixtures = (name for name, module in block.named_modules() if name and is_experts(module))
    mixture = next((name for name in mixtures if not _is_attention(name)), "")
    outside = [item for item in linears(block) if not _mixes_tokens(item.name) and not _within(item.name, mixture)]
    stack = _stack(path, block, model)
    found = _pair(outside)
    if found is not None:
        up, gate, down = found
        holder = _common_parent([up.name, down.name] + ([gate.name] if gate else []))
        return FFNSite(
            name=f"{path}.{holder}" if holder else path,
            layer=layer,
            up=f"{path}.{up.name}",
            down=f"{path}.{down.name}",
            gate=f"{path}.{gate.name}" if gate else None,
            activation=activation_of(block.get_submodule(holder), model),
            width=down.outside,
            inner=down.inside,
            stack=stack,
        )
    sizes = experts_in(block.get_submodule(mixture)) if mixture else None
    if sizes is None:
        return None
    name = f"{path}.{mixture}"
    activation = activation_of(block.get_submodule(mixture), model)
    return FFNSite(name, layer, name, name, None, activation, sizes.width, sizes.inner, stack, sizes.count)


def _pair(items: list[Linear]) -> tuple[Linear, Linear | None, Linear] | None:
    """(up, gate, down) of the widest FFN among linears in order of registration; None for no FFN or several of that size."""
    pairs: list[tuple[Linear, list[Linear]]] = []  # down, its ups
    for position, down in enumerate(items):
        before = [item for item in items[:position] if item.inside == down.outside]
        ups = [item for item in before if item.outside == down.inside]
        fused = [item for item in before if item.outside == 2 * down.inside]
        if 1 <= len(ups) <= 2 or (not ups and len(fused) == 1):
            pairs.append((down, ups or [fused[0], fused[0]]))
    widest = max((down.inside for down, _ in pairs), default=0)
    pairs = [pair for pair in pairs if pair[0].inside == widest]
    if len(pairs) != 1:
        return None
    down, ups = pairs[0]
    if len(ups) == 1:
        return ups[0], None, down
    first, second = ups
    gate_is_second = "gate" in second.name.rpartition(".")[2] and "gate" not in first.name.rpartition(".")[2]
    return (first, second, down) if gate_is_second else (second, first, down)


def _is_attention(name: str) -> bool:
    return any(word in name.lower() for word in _ATTENTION)


def _mixes_tokens(name: str) -> bool:
    return _is_attention(name) or any(word in name.lower() for word in _RECURRENCE)


def _attends(block: nn.Module) -> bool:
    """False for an expert or a head: an FFN alone is not a layer of the model."""
    return any(_is_attention(name) for name, _ in block.named_modules())


def _within(name: str, holder: str) -> bool:
    return bool(holder) and name.startswith(f"{holder}.")


def _stack(path: str, block: nn.Module, model: nn.Module) -> str:
    for part in path.lower().split("."):
        for word in (*_SENSES, "encoder", "decoder"):
            if word in part:
                return word
    causal = {value for module in block.modules() if isinstance(value := getattr(module, "is_causal", None), bool)}
    if causal:
        return "decoder" if True in causal else "encoder"
    can_generate = getattr(model, "can_generate", None)
    return "decoder" if callable(can_generate) and can_generate() else ""


def _common_parent(names: list[str]) -> str:
    parents = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _describe(model: nn.Module) -> str:
    found = [f"{item.name} {item.inside}->{item.outside}" for item in linears(model)]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return f"module lists {some(lists)} and linear layers {some(found)}"
