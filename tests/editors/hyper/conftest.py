"""Gradients of tiny classifiers, taken the plain way, and settings that train in a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.editors.conftest import CITIES, FRAMES, NAMES, sentence
from xpatch.editors.guard import untouched
from xpatch.editors.hyper.capture import Signals, capture
from xpatch.editors.hyper.sites import EditedLinear, edited_linears
from xpatch.editors.hyper.texts import Encoder
from xpatch.models.linears import linear
from xpatch.patches.requests import EditRequest, Probe

# Random models tell texts apart far less than trained ones.
FAST: dict[str, Any] = {
    "layers": 2, "steps": 6, "validate_every": 3, "validation_edits": 4, "edits_per_step": 4, "warmup": 0, "decay": "none",
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "mend": {**FAST, "rank": 8},
    "lime-mend": {**FAST, "rank": 8},
    "ke": {**FAST, "hidden": 8, "condition": 8},
    "lime-ke": {**FAST, "hidden": 8, "condition": 8},
}


def facts(count: int = 12, languages: Sequence[str] = tuple(FRAMES), target: str | None = None) -> list[EditRequest]:
    """Requests without a target, as an editor's training needs them."""
    return [
        EditRequest.model_validate(
            {
                "id": f"fact-{number}",
                "target": target,
                "versions": {
                    language: {"text": sentence(language, 0, number), "rephrases": [sentence(language, 1, number)]}
                    for language in languages
                },
            }
        )
        for number in range(count)
    ]


def probes(count: int = 3) -> list[Probe]:
    """English texts of different lengths."""
    return [
        Probe(text=" ".join([sentence("en", 0, number), *([NAMES[0], CITIES[0]] * number)])) for number in range(count)
    ]


def signals_of(
    model: Any, tokenizer: Any, texts: Sequence[Probe], labels: Sequence[int], **options: Any
) -> tuple[tuple[EditedLinear, ...], dict[str, Signals]]:
    """`capture` on a model that is put right for it."""
    with untouched(model):
        items = edited_linears(model, **{"layers": 2, **options})
        wanted = torch.tensor(labels)
        return items, capture(model, Encoder(model, tokenizer)(texts), lambda _: wanted, items)[0]


def gradients(model: Any, tokenizer: Any, probe: Probe, label: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """dNLL/dW of one text by plain autograd, each `[D_out, D_in]`."""
    weights = [linear(model, name)[0].weight for name in names]
    inputs = Encoder(model, tokenizer)([probe])
    loss = torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([label]))
    found = torch.autograd.grad(loss, weights)
    conv = [type(linear(model, name)[0]).__name__ == "Conv1D" for name in names]
    return {name: g.T if turned else g for name, g, turned in zip(names, found, conv, strict=True)}
