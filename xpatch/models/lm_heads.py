"""Language models: which kind one is, what its final FFN's output becomes, and the rows an edit is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite, final_ffn
from xpatch.models.readers import every_row
from xpatch.models.surgery import Surgery
from xpatch.models.tails import Tail, as_rows, factor_between, first_tensor, logits_in, output_in, tail_of, times

Kind = Literal["causal", "seq2seq", "masked"]
_TOLERANCE = 1e-3  # of the largest logit: two orders of sums over D and V in fp32


class _EnoughSeen(Exception):
    """Ends a forward whose logits nobody needs."""


@dataclass(frozen=True, eq=False)
class LMHead:
    """The head of a language model: tail(ffn_output `[M, D]`, residual `[M, D]`) -> logits `[M, V]`, differentiable.

    site: the final FFN (of the decoder, in an encoder-decoder). kind: "causal", "seq2seq" or "masked". vocabulary: V.
    """

    site: FFNSite
    kind: Kind
    vocabulary: int
    tail: Tail


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Rows of chosen tokens: x `[M, D]` enters the FFN, base `[M, D]` leaves it, residual `[M, D]` is added to it.

    `head.tail(base, residual)` gives their logits `[M, V]`.
    """

    x: torch.Tensor
    residual: torch.Tensor
    base: torch.Tensor


def lm_kind(model: Any) -> Kind | None:
    """How a Hugging Face model speaks: token by token, alone ("causal") or to an encoder ("seq2seq"), or filling masks; None: not at all."""
    embeddings = getattr(model, "get_output_embeddings", None)
    if not callable(embeddings) or embeddings() is None:
        return None
    generates = callable(getattr(model, "can_generate", None)) and model.can_generate()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq" if generates else None
    return "causal" if generates else "masked"


def lm_head_of(model: nn.Module, inputs: Mapping[str, Any], kind: Kind) -> LMHead:
    """The head of a language model, found on `inputs` (one batch of `model`'s arguments) and checked against its forward.

    The check disturbs the FFN's output and compares every logit. The model must be in eval mode; it is left as it was.
    Raises `MismatchError` for a model whose tail is not known, or whose final FFN is used more than once.
    """
    site = final_ffn(model)
    if site.uses > 1:
        raise MismatchError(
            f"the final FFN {site.name!r} of {type(model).__name__} runs {site.uses} times in one forward, so that a patch would change "
            "its own input; expected layers with weights of their own"
        )
    if kind == "seq2seq" and site.stack != "decoder":
        raise MismatchError(
            f"the final FFN of {type(model).__name__} is {site.name!r}, in the stack {site.stack or 'of no name'!r}; expected the decoder's"
        )
    return _checked(model, LMHead(site, kind, 0, tail_of(model, site, inputs)), inputs)


def capture_tokens(model: nn.Module, inputs: Mapping[str, Any], head: LMHead, chosen: torch.Tensor) -> TokenFeatures:
    """One forward in eval mode without gradients, and the rows of the tokens that `chosen` `[B, T]` (bool) marks, in its order.

    Everything below the final FFN is frozen and a patch changes the FFN's output at its own token alone: no later layer mixes tokens,
    so the inputs x and the residuals of all tokens stay what they are. Training on such rows is therefore the same as training through
    the model with teacher forcing. The model answers as it does now, patches included.
    """
    seen, _ = _watched(model, inputs, head, logits=False)
    rows = {key: value[chosen.flatten().to(value.device)] for key, value in seen.items()}
    return TokenFeatures(x=rows["x"], residual=rows["sum"] - head.tail.enter(rows["base"]), base=rows["base"])


def _watched(
    model: nn.Module,
    inputs: Mapping[str, Any],
    head: LMHead,
    disturbed: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    logits: bool = True,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One forward: "x", "base" and "sum" (where the residual has been added), and the logits, all as rows `[B·T, ...]`.

    Without `logits` it ends at the sum: a batch's logits over a large vocabulary would be most of its memory.
    """
    seen: dict[str, torch.Tensor] = {}
    tail, site = head.tail, head.site

    def keep_input(key: str) -> Any:
        return lambda module, args, kwargs: seen.__setitem__(key, _rows(first_tensor(args, kwargs)))

    def keep_output(key: str) -> Any:
        return lambda module, args, output: seen.__setitem__(key, as_rows(output_in(output)))

    def enough(*_: Any) -> None:
        raise _EnoughSeen

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        assert disturbed is not None
        moved = disturbed(output_in(output))
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with Surgery() as surgery, torch.no_grad(), every_row():
        surgery.before(model.get_submodule(site.up), keep_input("x"), kwargs=True)
        if disturbed is not None:
            surgery.after(model.get_submodule(site.down), disturb)
        surgery.after(model.get_submodule(site.down), keep_output("base"))
        if tail.summed:
            surgery.before(model.get_submodule(tail.summed), keep_input("sum"), kwargs=True)
        else:
            surgery.after(model.get_submodule(tail.block), keep_output("sum"))
        if not logits:
            reached = surgery.before if tail.summed else surgery.after
            reached(model.get_submodule(tail.summed or tail.block), enough)
        try:
            return seen, as_rows(logits_in(model(**inputs)))
        except _EnoughSeen:
            return seen, seen["sum"][:0]


def _checked(model: nn.Module, head: LMHead, inputs: Mapping[str, Any]) -> LMHead:
    """`head`, where its tail gives the logits of a forward whose FFN output is moved by as much as it is long."""
    plain, _ = _watched(model, inputs, head)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(plain["base"].shape, generator=draw).to(plain["base"]) * plain["base"].square().mean().sqrt()
    moved, logits = _watched(model, inputs, head, lambda output: output + noise.view_as(output))
    with torch.no_grad():
        head = _weighed(head, plain, moved)
        residual = plain["sum"] - head.tail.enter(plain["base"])
        again = head.tail(moved["base"], residual)
    if again.shape != logits.shape:
        raise _not_so(model, head, f"{tuple(again.shape)} logits, not {tuple(logits.shape)}")
    difference = float((again - logits).abs().max())
    if not difference <= _TOLERANCE * (1.0 + float(logits.abs().max())):
        raise _not_so(model, head, f"logits that differ by {difference:.3g}")
    if not torch.equal(plain["x"], moved["x"]):
        raise _not_so(model, head, "an input that depends on its own output")
    return replace(head, vocabulary=int(logits.shape[-1]))


def _weighed(head: LMHead, plain: Mapping[str, torch.Tensor], moved: Mapping[str, torch.Tensor]) -> LMHead:
    """The head with the factor that the FFN's output is added with (Granite's `residual_multiplier`), where there is one."""
    entered = head.tail.enter(moved["base"]) - head.tail.enter(plain["base"])
    factor = factor_between(entered, moved["sum"] - plain["sum"], 1e-3)
    if factor is None or abs(factor - 1.0) < 1e-3:
        return head
    return replace(head, tail=replace(head.tail, own=(*head.tail.own, times(factor))))


def _rows(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None  # a layer is called with its hidden states
    return as_rows(value)


def _not_so(model: nn.Module, head: LMHead, found: str) -> MismatchError:
    return MismatchError(
        f"the head of {type(model).__name__} is not what one forward suggests: moving the output of its final FFN {head.site.name!r} "
        f"gives {found} in what was taken for the rest of the model; this model cannot be edited at its final FFN"
    )
