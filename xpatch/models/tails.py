"""What a language model computes after its final FFN, found by watching one forward and checked by a second, disturbed one.

Names and classes differ from family to family; what happens to the FFN's output y does not. It may pass modules of its own (a norm
behind the FFN), is added to the residual once, passes modules of the whole stack (a norm, a head) and simple arithmetic between them
(T5's factor, a bias, a soft cap). Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite
from xpatch.models.readers import every_row
from xpatch.models.surgery import Surgery

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Tail:
    """The steps from the FFN's output to the logits, each on rows `[M, D]`: `own` before the residual is added, `after` behind it.

    block: dotted name of the module that adds the residual. summed: the module whose input is the sum, or "" where the sum is the
    block's output.
    """

    block: str
    summed: str
    own: tuple[Step, ...]
    after: tuple[Step, ...]

    def __call__(self, ffn_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """ffn_output, residual `[M, D]` -> logits `[M, V]`."""
        hidden = self.enter(ffn_output) + residual
        for step in self.after:
            hidden = step(hidden)
        return hidden

    def enter(self, ffn_output: torch.Tensor) -> torch.Tensor:
        """What is added to the residual `[M, D]`."""
        for step in self.own:
            ffn_output = step(ffn_output)
        return ffn_output


@dataclass
class _Call:
    """One outermost module call after the FFN, within its block or behind it; rows `[M, D]` that it got and gave."""

    name: str
    module: nn.Module
    entered: torch.Tensor | None
    inside: bool
    left: torch.Tensor | None = None


@dataclass
class _Watch:
    """What one forward showed: the FFN's output and its block's as rows `[M, D]`, and the calls after it."""

    output: torch.Tensor | None = None
    block: torch.Tensor | None = None
    calls: list[_Call] = field(default_factory=list)
    depth: int = 0


def tail_of(model: nn.Module, site: FFNSite, inputs: Mapping[str, Any]) -> Tail:
    """The tail of a language model behind its final FFN `site`, for the shapes of `inputs` (one batch of `model`'s arguments).

    The model must be in eval mode; it is left as it was. Raises `MismatchError` where a step is not known.
    """
    block = _block_of(site)
    watch = _Watch()
    with Surgery() as surgery, torch.no_grad(), every_row():
        _listen(model, site, block, watch, surgery)
        logits = logits_in(model(**inputs))
    if watch.output is None or watch.block is None:
        raise _unknown(model, site, "the FFN was not called")
    return _assembled(model, site, block, watch, as_rows(logits))


def logits_in(output: Any) -> torch.Tensor:
    """The logits `[B, T, V]` of a model's output."""
    return output["logits"] if isinstance(output, Mapping) else output[0]


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first floating tensor a module was called with."""
    found = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return next((value for value in found if value.is_floating_point()), None)


def output_in(output: Any) -> torch.Tensor:
    """A module's output; the first of several."""
    return output[0] if isinstance(output, tuple) else output


def as_rows(value: torch.Tensor) -> torch.Tensor:
    """`[..., D]` -> `[M, D]`. Some layers (OPT's, Llama 4's) flatten their tokens, others do not."""
    return value.reshape(-1, value.shape[-1])


def _block_of(site: FFNSite) -> str:
    """The innermost element of a list of modules that holds the FFN, or is it."""
    words = site.name.split(".")
    index = max((i for i, word in enumerate(words) if word.isdecimal()), default=len(words) - 1)
    return ".".join(words[: index + 1])


def _listen(model: nn.Module, site: FFNSite, block: str, watch: _Watch, surgery: Surgery) -> None:
    above = {".".join(site.down.split(".")[:end]) for end in range(len(site.down.split(".")) + 1)}
    surgery.after(model.get_submodule(site.down), lambda module, args, output: _heard(watch, output))
    surgery.after(model.get_submodule(block), lambda module, args, output: _closed(watch, output))
    for name, module in model.named_modules():
        if name in above or name.startswith(f"{site.down}."):
            continue

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            if watch.output is not None:
                watch.depth += 1
                if watch.depth == 1:
                    entered = first_tensor(args, kwargs)
                    rows = None if entered is None else as_rows(entered)
                    watch.calls.append(_Call(name, module, rows, watch.block is None))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if watch.output is not None:
                watch.depth -= 1
                if watch.depth == 0:
                    left = output_in(output)
                    watch.calls[-1].left = as_rows(left) if isinstance(left, torch.Tensor) else None

        surgery.before(module, enter, kwargs=True)
        surgery.after(module, leave)


def _heard(watch: _Watch, output: Any) -> None:
    watch.output, watch.block, watch.depth = as_rows(output_in(output)), None, 0
    watch.calls.clear()


def _closed(watch: _Watch, output: Any) -> None:
    if watch.output is not None and watch.block is None:
        watch.block = as_rows(output_in(output))


def _assembled(model: nn.Module, site: FFNSite, block: str, watch: _Watch, logits: torch.Tensor) -> Tail:
    assert watch.output is not None and watch.block is not None
    current, summed = watch.output, ""
    own: list[Step] = []
    after: list[Step] = []
    for call in (call for call in watch.calls if call.inside):
        if not _is_step(call, current):
            continue
        assert call.entered is not None and call.left is not None
        factor = factor_between(current, call.entered)
        if factor is None and not summed and "norm" in type(call.module).__name__.lower():
            factor, summed = 1.0, call.name
        if factor is not None:
            _append(after if summed else own, call, factor)
            current = call.left
    if not summed:
        current = watch.block
    elif factor_between(current, watch.block) != 1.0:
        raise _unknown(model, site, f"{block!r} goes on after {summed!r}")
    for call in (call for call in watch.calls if not call.inside):
        if not _is_step(call, current):
            continue
        assert call.entered is not None and call.left is not None
        factor = factor_between(current, call.entered)
        if factor is None:
            raise _unknown(model, site, f"what {call.name!r} gets is not what the module before it gave")
        _append(after, call, factor)
        current = call.left
    last = _last(model, current, logits)
    if last is None:
        raise _unknown(
            model, site, "the logits are not what the last module gave, nor that with a known bias, factor or soft cap"
        )
    return Tail(block, summed, tuple(own), (*after, *last))


def _is_step(call: _Call, current: torch.Tensor) -> bool:
    """Whether a call has to do with every token of the hidden states; poolers and masks do not."""
    if call.entered is None or call.left is None or call.entered.shape != current.shape:
        return False
    return call.left.shape[:-1] == current.shape[:-1]


def _append(steps: list[Step], call: _Call, factor: float) -> None:
    assert call.entered is not None and call.left is not None
    if factor != 1.0:
        steps.append(times(factor))
    if not torch.equal(call.left, call.entered):  # dropout in eval mode does nothing
        steps.append(_rowwise(call.module))


def _rowwise(module: nn.Module) -> Step:
    return lambda rows: output_in(module(rows.unsqueeze(1))).squeeze(1)


def times(factor: float) -> Step:
    """The step that multiplies by `factor`."""
    return lambda rows: rows * factor


def factor_between(before: torch.Tensor, after: torch.Tensor, tolerance: float = 1e-5) -> float | None:
    """The number that turns `before` into `after` (same shape); None where there is none but 0."""
    if before.shape != after.shape:
        return None
    if torch.equal(before, after):
        return 1.0
    first, second = before.double(), after.double()
    square = float(first.square().sum())
    factor = float((first * second).sum()) / square if square else 0.0
    slack = 0.1 * tolerance * float(second.abs().max())
    return factor if factor and torch.allclose(first * factor, second, rtol=tolerance, atol=slack) else None


def _last(model: nn.Module, current: torch.Tensor, logits: torch.Tensor) -> tuple[Step, ...] | None:
    """The arithmetic between the last module's output and the logits."""
    factor = factor_between(current, logits.to(current))
    if factor is not None:
        return () if factor == 1.0 else (times(factor),)
    bias = getattr(model, "final_logits_bias", None)  # BART
    if isinstance(bias, torch.Tensor) and bias.shape[-1] == current.shape[-1]:
        row = bias.reshape(-1)
        if torch.allclose(current + row, logits):
            return (lambda rows: rows + row,)
    config: Any = model.config
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    cap = getattr(text, "final_logit_softcapping", None)  # Gemma 2
    if isinstance(cap, (int, float)) and cap:
        bound = float(cap)
        if torch.allclose(torch.tanh(current / bound) * bound, logits, atol=1e-5):
            return (lambda rows: torch.tanh(rows / bound) * bound,)
    return None


def _unknown(model: nn.Module, site: FFNSite, found: str) -> MismatchError:
    return MismatchError(
        f"what {type(model).__name__} computes after its final FFN {site.name!r} is not known: {found}; expected modules that treat "
        "each token by itself, one residual, and a head; this model cannot be edited at its final FFN"
    )
