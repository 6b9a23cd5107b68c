"""Patches inside compiled graphs: three opaque operators that find the published state and the row choice when they run.

A graph holds no patch, so applying and removing never compiles anything again. Which model and site is meant travels as small
integer tensors, for the compiler would make one graph per Python number. `state [1]` belongs to one model: `enter` and `leave`
claim to write to it, so that no compiler moves a site's operator out of its call.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from xpatch.errors import ConflictError
from xpatch.patches.locks import new_lock
from xpatch.runtime.calls import Call
from xpatch.runtime.compiled import guard_on_hooks
from xpatch.runtime.layer import add_patches
from xpatch.runtime.routing import rows_of_token

if TYPE_CHECKING:
    from xpatch.runtime.attach import Runtime

KINDS = ("generate", "forward", "part")
#: Calls a backward pass may still ask for. Only compiled calls with gradients are kept, the newest ones.
REMEMBERED = 256

_numbers = itertools.count(1)
_runtimes: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()
_calls: OrderedDict[int, Call] = OrderedDict()
_lock = new_lock()

_tags = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):  # they run Python, so a captured graph must be split around them
    _tags.append(torch.Tag.cudagraph_unsafe)
_library = torch.library.Library("xpatch", "FRAGMENT")
_library.define("enter(Tensor(a!) state, int kind, SymInt batch, Tensor? rows) -> ()", tags=_tags)
_library.define("leave(Tensor(a!) state, int kind) -> ()", tags=_tags)
_library.define(
    "patched(Tensor x, Tensor y, Tensor state, Tensor place, bool gradients) -> (Tensor, Tensor)", tags=_tags
)
_library.define(
    "patched_backward(Tensor grad, Tensor x, Tensor state, Tensor place, Tensor call) -> Tensor", tags=_tags
)


def register(runtime: Runtime) -> torch.Tensor:
    """A new number for `runtime`, as the tensor `[1]` that its operators carry."""
    number = next(_numbers)
    _runtimes[number] = runtime
    return number_tensor(number)


def all_runtimes() -> list[Runtime]:
    """The runtimes of this process."""
    return list(_runtimes.values())


def number_tensor(number: int) -> torch.Tensor:
    """`[1]` int64 on the CPU, usable in graphs with and without gradients."""
    with torch.inference_mode(False):
        return torch.tensor([number], dtype=torch.int64, device="cpu")


def _runtime(state: torch.Tensor) -> Runtime:
    runtime = _runtimes.get(int(state))
    if runtime is None:
        raise ConflictError(
            "a compiled graph holds the sites of a model that is gone (it was copied, or sent to another process, after it was "
            "compiled); call torch.compiler.reset() and run the model again"
        )
    return runtime


def _enter(state: torch.Tensor, kind: int, batch: int, rows: torch.Tensor | None) -> None:
    chosen = None if rows is None else rows_of_token(rows)
    _runtime(state).enter(KINDS[kind], chosen, batch if batch >= 0 else None)  # type: ignore[arg-type]


def _leave(state: torch.Tensor, kind: int) -> None:
    _runtime(state).exit(KINDS[kind])  # type: ignore[arg-type]


def _patched(
    x: torch.Tensor, y: torch.Tensor, state: torch.Tensor, place: torch.Tensor, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    runtime = _runtime(state)
    call = runtime.call()
    out = runtime.add(runtime.places[int(place)], x, y, call)
    if gradients and call.snapshot.sets:
        _remember(call)
    return y.clone() if out is None or out is y else out, torch.tensor([call.number])


def _remember(call: Call) -> None:
    with _lock:
        if call.number == 0:
            call.number = next(_numbers)
        _calls[call.number] = call
        while len(_calls) > REMEMBERED:
            _calls.popitem(last=False)


def _patched_backward(
    grad: torch.Tensor, x: torch.Tensor, state: torch.Tensor, place: torch.Tensor, call: torch.Tensor
) -> torch.Tensor:
    number = int(call)
    if number == 0:
        return torch.zeros_like(x)
    pinned = _calls.get(number)
    if pinned is None:
        raise ConflictError(
            f"backward through a compiled patched model: more than {REMEMBERED} other calls were made since the forward pass; run "
            "backward sooner, or train with the plain model"
        )
    steps = pinned.snapshot.steps.get(_runtime(state).places[int(place)])
    if not steps:
        return torch.zeros_like(x)
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        out = add_patches(steps, leaf, torch.zeros_like(grad), pinned.route)
        if not out.requires_grad:
            return torch.zeros_like(x)
        (result,) = torch.autograd.grad(out, leaf, grad, allow_unused=True)
    return torch.zeros_like(x) if result is None else result


def _fake_patched(
    x: torch.Tensor, y: torch.Tensor, state: torch.Tensor, place: torch.Tensor, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    guard_on_hooks()
    return torch.empty_like(y), torch.empty_like(place)


def _fake_enter(state: torch.Tensor, kind: int, batch: int, rows: torch.Tensor | None) -> None:
    guard_on_hooks()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _, state, place, _ = inputs
    ctx.save_for_backward(x, state, place, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, state, place, call = ctx.saved_tensors
    grad_x = torch.ops.xpatch.patched_backward(grad, x, state, place, call) if ctx.needs_input_grad[0] else None
    return grad_x, grad, None, None, None


for _name, _function in (
    ("enter", _enter),
    ("leave", _leave),
    ("patched", _patched),
    ("patched_backward", _patched_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("xpatch::enter", _fake_enter, lib=_library)
torch.library.register_fake("xpatch::leave", lambda state, kind: None, lib=_library)
torch.library.register_fake("xpatch::patched", _fake_patched, lib=_library)
torch.library.register_fake(
    "xpatch::patched_backward", lambda grad, x, state, place, call: torch.empty_like(x), lib=_library
)
torch.library.register_autograd("xpatch::patched", _backward, setup_context=_save, lib=_library)
