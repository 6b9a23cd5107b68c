"""Which hooks go where: around the model's calls, and at a site."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from xpatch.models.surgery import Surgery
from xpatch.patches.weights import innermost
from xpatch.runtime.calls import Slot
from xpatch.runtime.hooks import Add, Beside, Enter, Exit, Generate, Hook, Keep
from xpatch.runtime.saving import SavePretrained

if TYPE_CHECKING:
    from xpatch.runtime.attach import Runtime
    from xpatch.runtime.snapshot import Point


class Seat(NamedTuple):
    """Where a hooked module sits in its parent. Adapters and quantisation put another one there, whose calls go past the hooks."""

    parent: nn.Module
    name: str
    module: nn.Module

    @property
    def taken(self) -> bool:
        """Whether another module sits there now."""
        return self.parent._modules.get(self.name) is not self.module

    def strip(self, runtime: Runtime) -> None:
        """Take off the hooks that whoever took the seat got a copy of: torch's own quantisation hands them on."""
        successor = self.parent._modules.get(self.name)
        if successor is None or successor is self.module:
            return
        for hooks in (successor._forward_pre_hooks, successor._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and hook.runtime is runtime]:
                hooks.pop(key)


def seats_of(model: nn.Module, point: Point) -> list[Seat]:
    """The seats of the modules that a point's hooks are on."""
    split = [
        (model.get_submodule(parent), name)
        for parent, _, name in (n.rpartition(".") for n in (point.reads, point.adds))
    ]
    return [Seat(innermost(parent), name, parent.get_submodule(name)) for parent, name in split]


def install_base(runtime: Runtime, surgery: Surgery) -> None:
    """The hooks that pin a snapshot for each call: of the model, and of its direct parts called alone."""
    # An exit without its entry does nothing; an entry without its exit would leave a pin. Exits go up first, come down last.
    model = runtime.model
    parts = [child for child in model.children() if any(True for _ in child.children())]
    for child in parts:
        surgery.after(child, Exit(runtime, "part"), always=True)
    surgery.after(model, Exit(runtime, "forward"), always=True)
    for child in parts:
        surgery.before(child, Enter(runtime, "part"), first=True, kwargs=True)
    surgery.before(model, Enter(runtime, "forward"), first=True, kwargs=True)
    for name, wrapper in (("generate", Generate), ("save_pretrained", SavePretrained)):
        own = vars(model).get(name)
        if own is not None or callable(getattr(type(model), name, None)):
            surgery.attribute(model, name, wrapper(runtime, own))


def install_point(runtime: Runtime, point: Point, surgery: Surgery, slot: Slot) -> None:
    """The hooks of one site."""
    model = runtime.model
    adds = model.get_submodule(point.adds)
    if point.reads == point.adds:
        surgery.after(adds, Beside(runtime, point.site), kwargs=True)
    else:
        surgery.after(adds, Add(runtime, point.site, slot))
        surgery.before(model.get_submodule(point.reads), Keep(runtime, point.site, slot), kwargs=True)
