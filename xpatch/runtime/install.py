"""Which hooks go where: around the model's calls, and at a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xpatch.models.surgery import Surgery
from xpatch.runtime.calls import Slot
from xpatch.runtime.hooks import Add, Again, AgainEnd, Beside, Enter, Exit, Generate, Keep
from xpatch.runtime.saving import SavePretrained

if TYPE_CHECKING:
    from xpatch.runtime.attach import Runtime
    from xpatch.runtime.snapshot import Point


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
    """The hooks of one site, and those that recognise its layer when a backward pass computes it again."""
    model = runtime.model
    adds = model.get_submodule(point.adds)
    layer = layer_of(point.adds)
    if layer is not None:
        surgery.after(model.get_submodule(layer), AgainEnd(runtime), always=True)
    if point.reads == point.adds:
        surgery.after(adds, Beside(runtime, point.site), kwargs=True)
    else:
        surgery.after(adds, Add(runtime, point.site, slot))
        surgery.before(model.get_submodule(point.reads), Keep(runtime, point.site, slot), kwargs=True)
    if layer is not None:
        surgery.before(model.get_submodule(layer), Again(runtime), first=True, kwargs=True)


def layer_of(name: str) -> str | None:
    """The layer a module lies in: "bert.encoder.layer.3.output.dense" -> "bert.encoder.layer.3"; None outside of all layers."""
    words = name.split(".")
    number = next((index for index, word in enumerate(words) if word.isdecimal()), None)
    return None if number is None or number + 1 == len(words) else ".".join(words[: number + 1])
