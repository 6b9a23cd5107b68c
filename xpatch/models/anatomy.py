"""Finding the FFNs of a transformer by structure: in each block, the pair of linear layers `D -> F -> D` outside attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xpatch.errors import MismatchError

_ATTENTION = ("attention", "attn")
_CONFIG_ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
_KNOWN_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "linear": "identity",
}


@dataclass(frozen=True)
class FFNSite:
    """One FFN. `y = down(act(up(x)))`, or `down(act(gate(x)) * up(x))`; x and y are `[..., D]`.

    name: dotted path of the module that holds both linears (`PatchNeurons.site`): BERT "bert.encoder.layer.3", GPT-2
    "transformer.h.3.mlp". up, down, gate: dotted names of linears; `gate` is None in an ungated FFN and equals `up` where one
    linear computes both. activation: one of `xpatch.patches.types.ACTIVATIONS`, or the model's own name for another one.
    layer: index in its stack. width: D. inner: F.
    """

    name: str
    layer: int
    up: str
    down: str
    gate: str | None
    activation: str
    width: int
    inner: int


def find_ffn_sites(model: nn.Module) -> list[FFNSite]:
    """Every FFN of `model`, in the order of its layers (an encoder's before a decoder's).

    A block with several FFNs of one size (a mixture of experts) has no single place for a patch and gives no site.
    Raises `MismatchError` with what was found when there is no site at all.
    """
    sites = list(_walk(model, "", model))
    if not sites:
        raise MismatchError(
            f"no FFN was found in {type(model).__name__}: expected blocks in an nn.ModuleList, each with attention and "
            f"two linear layers D -> F -> D outside it; found {_describe(model)}. Only such models can hold patch neurons"
        )
    return sites


def final_ffn(model: nn.Module) -> FFNSite:
    """The last FFN in the order of computation: where Transformer-Patcher and MPN append their neurons."""
    return find_ffn_sites(model)[-1]


def ffn_site(model: nn.Module, name: str, sites: list[FFNSite] | None = None) -> FFNSite:
    """The FFN called `name` (of `sites`, where they were found before). Raises `MismatchError` listing the names there are."""
    sites = find_ffn_sites(model) if sites is None else sites
    for site in sites:
        if site.name == name:
            return site
    raise MismatchError(
        f"{type(model).__name__} has no FFN named {name!r}; it has {_some([site.name for site in sites])}"
    )


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(D_in, D_out)` of a linear layer (nn.Linear, its quantised and adapted relatives, GPT-2's Conv1D); None for others."""
    inside, outside = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inside, int) and isinstance(outside, int):
        return inside, outside
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def linear(model: nn.Module, name: str) -> tuple[nn.Module, int, int]:
    """The linear layer at the dotted `name`, with its `D_in` and `D_out`. Raises `MismatchError` listing its neighbours."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    shape = linear_shape(module) if module is not None and name else None
    if module is None or shape is None:
        found = "no such module" if module is None else f"a {type(module).__name__}"
        names = [other for other, _, _, _ in _linears(model)]
        near = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]] or names
        raise MismatchError(
            f"{type(model).__name__} has no linear layer named {name!r} (found {found}); linear layers are {_some(near)}"
        )
    return module, *shape


def _walk(module: nn.Module, prefix: str, model: nn.Module) -> Iterator[FFNSite]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            sites = [_site_in(block, f"{path}.{index}", index, model) for index, block in enumerate(child)]
            if any(sites):
                yield from (site for site in sites if site is not None)
                continue
        yield from _walk(child, f"{path}.", model)


def _site_in(block: nn.Module, path: str, layer: int, model: nn.Module) -> FFNSite | None:
    if not any(_is_attention(name) for name, _ in block.named_modules()):
        return None  # an expert, a head: an FFN alone is not a layer of the model
    linears = [item for item in _linears(block) if not _is_attention(item[0])]
    pairs = []  # (F, position of down, its ups)
    for position, (_, _, inner, width) in enumerate(linears):
        before = linears[:position]
        ups = [item for item in before if item[2] == width and item[3] == inner]
        fused = [item for item in before if item[2] == width and item[3] == 2 * inner]
        if 1 <= len(ups) <= 2 or (not ups and len(fused) == 1):
            pairs.append((inner, position, ups or [fused[0], fused[0]]))
    if not pairs:
        return None
    inner = max(pair[0] for pair in pairs)
    widest = [pair for pair in pairs if pair[0] == inner]
    if len(widest) > 1:
        return None
    _, position, ups = widest[0]
    down, _, _, width = linears[position]
    up, gate = _up_and_gate([item[0] for item in ups])
    holder = _common_parent([up, down] + ([gate] if gate else []))
    name = f"{path}.{holder}" if holder else path
    return FFNSite(
        name=name,
        layer=layer,
        up=f"{path}.{up}",
        down=f"{path}.{down}",
        gate=f"{path}.{gate}" if gate else None,
        activation=_activation_of(block.get_submodule(holder), model),
        width=width,
        inner=inner,
    )


def _is_attention(name: str) -> bool:
    return any(word in name.lower() for word in _ATTENTION)


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, int, int]]:
    """Outermost linear layers with their shapes, in order of registration (an adapted layer counts once)."""
    for name, child in module.named_children():
        shape = linear_shape(child)
        if shape is not None:
            yield f"{prefix}{name}", child, *shape
        else:
            yield from _linears(child, f"{prefix}{name}.")


def _up_and_gate(ups: list[str]) -> tuple[str, str | None]:
    if len(ups) == 1:
        return ups[0], None
    first, second = ups
    gate_is_second = "gate" in second.rpartition(".")[2] and "gate" not in first.rpartition(".")[2]
    return (first, second) if gate_is_second else (second, first)


def _common_parent(names: list[str]) -> str:
    parents = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _activation_of(holder: nn.Module, model: nn.Module) -> str:
    """By its values on a grid where a function is found beside the linears, else by its name in the configuration."""
    for function in _functions(holder):
        name = _recognise(function)
        if name is not None:
            return name
    config = getattr(model, "config", None)
    for field in _CONFIG_ACTIVATION:
        value = getattr(config, field, None)
        if isinstance(value, str):
            return _KNOWN_NAMES.get(value, value)
    return "unknown"


def _functions(holder: nn.Module) -> Iterator[Callable[[torch.Tensor], Any]]:
    for path, module in holder.named_modules():
        if _is_attention(path):
            continue
        for name, value in vars(module).items():
            if "act" in name and callable(value):
                yield value
        bare = not any(True for _ in module.parameters()) and not any(True for _ in module.children())
        if bare and "dropout" not in type(module).__name__.lower() and not isinstance(module, nn.Identity):
            yield module


def _recognise(function: Callable[[torch.Tensor], Any]) -> str | None:
    from torch.nn import functional as F

    grid = torch.linspace(-4, 4, 81, dtype=torch.float64)
    known: dict[str, torch.Tensor] = {
        "relu": F.relu(grid),
        "gelu": F.gelu(grid),
        "gelu_tanh": F.gelu(grid, approximate="tanh"),
        "silu": F.silu(grid),
        "identity": grid,
    }
    try:
        with torch.no_grad():
            values = function(grid)
    except Exception:  # not a function of one tensor: not an activation
        return None
    if not isinstance(values, torch.Tensor) or values.shape != grid.shape:
        return None
    for name, expected in known.items():
        if torch.allclose(values.to(torch.float64), expected, atol=1e-6):
            return name
    return None


def _describe(model: nn.Module) -> str:
    linears = [f"{name} {inside}->{outside}" for name, _, inside, outside in _linears(model)]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return f"module lists {_some(lists)} and linear layers {_some(linears)}"


def _some(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"
