"""Which bases a model was found to be, so that a set for the same base is swapped in without looking at every weight again."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from xpatch.patches.locks import new_lock

if TYPE_CHECKING:
    from xpatch.patches.identity import BaseIdentity

_KEPT = 8  # bases of one model: more than a few are never in use
_PLAIN = torch.Tensor.__torch_dispatch__
_lock = new_lock()
_known: weakref.WeakKeyDictionary[torch.nn.Module, Fits] = weakref.WeakKeyDictionary()

_Watched = tuple["weakref.ref[torch.Tensor]", int, int]  # a tensor, its version, its address


@dataclass(frozen=True, eq=False)
class _Module:
    """One module with weights of its own, by its dotted name. Nothing here keeps a module or a tensor alive."""

    name: str
    module: weakref.ref[torch.nn.Module]
    tensors: tuple[_Watched, ...]

    def holds(self) -> bool:
        """Whether its tensors are the very ones they were, in their places and unwritten (writes through `.data` do not show)."""
        module = self.module()
        if module is None:
            return False
        present = list(_own(module))
        return len(present) == len(self.tensors) and all(
            kept() is tensor and tensor._version == version and tensor.data_ptr() == address
            for tensor, (kept, version, address) in zip(present, self.tensors, strict=True)
        )


@dataclass(frozen=True, eq=False)
class _Found:
    """A base that fits, how it was looked at, and the modules of the layers it touches and of the head."""

    base: BaseIdentity
    how: Hashable
    near: tuple[_Module, ...]


@dataclass(frozen=True, eq=False)
class Fits:
    """modules: all that hold weights. glimpse: one value of each matrix."""

    modules: tuple[_Module, ...]
    glimpse: tuple[float, ...]
    found: tuple[_Found, ...] = ()

    def hold(self) -> bool:
        """Whether all weights are as they were."""
        return all(each.holds() for each in self.modules) and _glimpse(self.modules) == self.glimpse


def known(model: torch.nn.Module, base: BaseIdentity, how: Hashable, *, served: bool = False) -> bool:
    """Whether `base` was found to fit `model`, looked at in the way `how`, and the model's weights are still the same.

    served: a set for this base is on the model, so a change of the base would concern that one just as much; then only the layers the
    set touches and the head are looked at, which takes microseconds.
    """
    fits = _known.get(model)
    found = next((each for each in fits.found if each.base == base and each.how == how), None) if fits else None
    if fits is None or found is None:
        return False
    return all(each.holds() for each in found.near) if served else fits.hold()


def remember(model: torch.nn.Module, base: BaseIdentity, how: Hashable) -> None:
    """Note that `base` fits `model` as it is now. Weights that cannot be watched (offloaded, in inference mode) are not noted."""
    fits = _known.get(model)
    if fits is None or not fits.hold():
        modules = []
        for name, module in model.named_modules():
            tensors = list(_own(module))
            if not all(map(_watchable, tensors)):
                return
            if tensors:
                watched = tuple((weakref.ref(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors)
                modules.append(_Module(name, weakref.ref(module), watched))
        fits = Fits(tuple(modules), _glimpse(modules))
    body = f"{getattr(model, 'base_model_prefix', '')}."
    touched = (*(f"{layer}." for layer in base.touched), f"{body}pooler.")
    near = [each for each in fits.modules if f"{each.name}.".startswith(touched) or not each.name.startswith(body)]
    with _lock:
        _known[model] = Fits(fits.modules, fits.glimpse, (*fits.found, _Found(base, how, tuple(near)))[-_KEPT:])


def _own(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for owner in (module._parameters, module._buffers):
        for tensor in owner.values():
            if tensor is not None:
                yield tensor


@torch.no_grad()
def _glimpse(modules: Iterable[_Module]) -> tuple[float, ...]:
    """The first value of each matrix: merging an adapter writes through `.data`, which leaves every version as it was."""
    firsts: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for each in modules:
        for kept, _, _ in each.tensors:
            tensor = kept()
            if tensor is not None and tensor.ndim > 1 and tensor.numel():
                first = tensor.as_strided((1,), (1,), tensor.storage_offset())
                firsts.setdefault((tensor.device, tensor.dtype), []).append(first)
    return tuple(value for group in firsts.values() for value in torch.cat(group).float().tolist())


def _watchable(tensor: torch.Tensor) -> bool:
    return not tensor.is_inference() and tensor.device.type != "meta" and type(tensor).__torch_dispatch__ is _PLAIN
