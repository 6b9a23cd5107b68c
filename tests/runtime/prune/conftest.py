"""Models whose logits spread (a usual initialisation leaves them near zero), and what their last FFN sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from xpatch.models.anatomy import final_ffn
from xpatch.runtime.attach import runtime_of


@pytest.fixture
def lively(tiny) -> Callable[..., Any]:
    """`tiny` with larger weights; `head`: the class of that ending instead of the family's own, padded with 0."""

    def make(family: str, *, head: str | None = None, **more: Any) -> Any:
        import transformers as hf

        model = tiny(family, **{"initializer_range": 0.3, **more})
        if head is None or type(model).__name__.endswith(head):
            return model
        name = type(model).__name__.replace("ForCausalLM", head).replace("LMHeadModel", head)
        model.config.pad_token_id = 0
        return getattr(hf, name)(model.config).eval()

    return make


@contextmanager
def watched(model: nn.Module, name: str | None = None) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that reach the up projection of the final FFN (or the module `name`)."""
    seen: list[tuple[int, ...]] = []
    module = model.get_submodule(name or final_ffn(model).up)
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple((*args, *kwargs.values())[0].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def nothing_left(model: nn.Module) -> bool:
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    own = {name for module in model.modules() for name in vars(module)}
    return hooks == 0 and runtime_of(model) is None and not own & {"generate", "save_pretrained"}


@pytest.fixture
def seen_by() -> Any:
    return watched


@pytest.fixture
def bare() -> Callable[[nn.Module], bool]:
    return nothing_left


@pytest.fixture
def near() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Equal as the optimised and the full computation must be."""

    def check(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    return check
