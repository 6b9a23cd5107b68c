"""Typical inputs of the patched sites: what their keys are packed for. They decide how fast screening is, never what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from xpatch.errors import MismatchError
from xpatch.models.surgery import Surgery
from xpatch.runtime.hooks import first_tensor
from xpatch.runtime.snapshot import Point

ROWS_AT_MOST = 2048
Sample = Mapping[str, Any] | Iterable[Mapping[str, Any]]


def typical_rows(model: nn.Module, points: Iterable[Point], sample: Sample) -> dict[str, torch.Tensor]:
    """site -> the rows `[M, D]` in fp32 on the CPU that reach it when the model answers `sample`, `ROWS_AT_MOST` at most.

    sample: keyword arguments of one call of the model, or several such mappings. The calls are made in eval mode without
    gradients; patches and pruning are as they are. Raises `MismatchError` for a sample of another kind, or an empty one.
    """
    batches = [sample] if isinstance(sample, Mapping) else list(sample)
    if not batches or not all(isinstance(batch, Mapping) for batch in batches):
        found = "nothing" if not batches else ", ".join(sorted({type(batch).__name__ for batch in batches}))
        raise MismatchError(
            "prepare(sample=...): expected the keyword arguments of a call of the model, such as tokenizer(texts, "
            f"return_tensors='pt', padding=True), or a list of them; found {found}"
        )
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(site: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            if x is not None:
                seen.setdefault(site, []).append(x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float32))

        return hook

    training = [module for module in model.modules() if module.training]
    # Code that was compiled before would not see the hooks.
    with Surgery() as surgery, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for point in points:
            surgery.before(model.get_submodule(point.reads), keep(point.site), kwargs=True)
        try:
            for module in training:
                module.training = False
            for batch in batches:
                model(**batch)
        finally:
            for module in training:
                module.training = True
    return {site: _some(torch.cat(rows)) for site, rows in seen.items()}


def _some(rows: torch.Tensor) -> torch.Tensor:
    return rows[:: max(1, -(-len(rows) // ROWS_AT_MOST))].clone()
