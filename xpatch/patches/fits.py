"""Which bases a model was found to be, so that a set for the same base is swapped in without looking at every weight again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from xpatch.patches.identity import BaseIdentity

_KEPT = 8  # bases of one model: more than a few are never in use
_PLAIN = torch.Tensor.__torch_dispatch__
_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[torch.nn.Module, Fits] = weakref.WeakKeyDictionary()

_Watched = tuple["weakref.ref[torch.Tensor]", int, int]  # a tensor, its version, its address


@dataclass(frozen=True, eq=False)
class Fits:
    """weights: each module that has some, with its tensors in order. Nothing here keeps a module or a tensor alive."""

    weights: tuple[tuple[weakref.ref[torch.nn.Module], tuple[_Watched, ...]], ...]
    found: tuple[tuple[BaseIdentity, Hashable], ...] = ()

    def hold(self) -> bool:
        """Whether every weight is the very tensor it was, in its place and unwritten (writes through `.data` do not show)."""
        for reference, watched in self.weights:
            module = reference()
            if module is None:
                return False
            tensors = list(_own(module))
            if len(tensors) != len(watched):
                return False
            for tensor, (kept, version, address) in zip(tensors, watched, strict=True):
                if kept() is not tensor or tensor._version != version or tensor.data_ptr() != address:
                    return False
        return True


def known(model: torch.nn.Module, base: BaseIdentity, how: Hashable) -> bool:
    """Whether `base` was found to fit `model`, looked at in the way `how`, and the model's weights are still the same."""
    fits = _known.get(model)
    return fits is not None and any(other == base and way == how for other, way in fits.found) and fits.hold()


def remember(model: torch.nn.Module, base: BaseIdentity, how: Hashable) -> None:
    """Note that `base` fits `model` as it is now. Weights that cannot be watched (offloaded, in inference mode) are not noted."""
    fits = _known.get(model)
    if fits is None or not fits.hold():
        weights = []
        for module in model.modules():
            tensors = list(_own(module))
            if not all(map(_watchable, tensors)):
                return
            if tensors:
                watched = tuple((weakref.ref(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors)
                weights.append((weakref.ref(module), watched))
        fits = Fits(tuple(weights))
    with _lock:
        _known[model] = Fits(fits.weights, (*fits.found, (base, how))[-_KEPT:])


def _own(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for owner in (module._parameters, module._buffers):
        for tensor in owner.values():
            if tensor is not None:
                yield tensor


def _watchable(tensor: torch.Tensor) -> bool:
    return not tensor.is_inference() and tensor.device.type != "meta" and type(tensor).__torch_dispatch__ is _PLAIN
