"""Greedy generation with an exported decoder or encoder-decoder, step by step through its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from xpatch.errors import MismatchError
from xpatch.exporters.description import PAST, PRESENT
from xpatch.exporters.feed import Array
from xpatch.runtime.routing import Rows

if TYPE_CHECKING:
    from xpatch.exporters.session import Session


def generate(session: Session, inputs: Mapping[str, Any], max_new_tokens: int, xpatch: Rows | None) -> Array:
    """As `Session.generate` says."""
    base = session.base
    if base.kind == "logits":
        raise MismatchError(f"{base.architecture} gives logits and generates no text; call run")
    own = "input_ids" if base.kind == "decoder" else "decoder_input_ids"
    given = {name: np.asarray(value, np.int64) for name, value in inputs.items() if name in base.inputs}
    if "input_ids" not in given or given["input_ids"].ndim != 2:
        raise MismatchError(f"expected input_ids [batch, tokens], found {', '.join(inputs) or 'nothing'}")
    rows, length = given["input_ids"].shape
    mask = given.setdefault("attention_mask", np.ones((rows, length), np.int64))
    if base.kind == "decoder" and not mask[:, -1:].all():
        raise MismatchError(
            "a decoder goes on behind the last token of each prompt, and some end in padding; pad them on the left "
            "(tokenizer.padding_side = 'left')"
        )
    said = given["input_ids"] if base.kind == "decoder" else np.full((rows, 1), base.start_token or 0, np.int64)
    patches = session.patch_inputs(rows, xpatch=xpatch)
    ended = np.zeros(rows, bool)
    past: dict[str, Array] = {}
    step = said
    for _ in range(max_new_tokens):
        text = {} if base.kind == "decoder" or past else {"input_ids": given["input_ids"]}
        found = session.step({**text, own: step, "attention_mask": mask, **past}, patches)
        past = {PAST + name.removeprefix(PRESENT): value for name, value in found.items() if name != "logits"}
        chosen = np.where(ended, base.pad_token, found["logits"][:, -1].argmax(-1))
        step = chosen[:, None].astype(np.int64)
        said = np.concatenate([said, step], axis=1)
        if base.kind == "decoder":
            mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], axis=1)
        ended |= np.isin(chosen, base.end_tokens)
        if ended.all():
            break
    return said
