"""Before an export is put in place: with nothing fed, its graphs compute what the model does, also for shapes they were not traced with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xpatch.errors import BackendError
from xpatch.exporters.calls import positions, sample, takes_positions
from xpatch.exporters.description import PAST, PRESENT, OnnxBase
from xpatch.exporters.feed import Array
from xpatch.exporters.session import Session
from xpatch.exporters.trace import evaluating

#: Largest difference between the exported graphs and the model that is accepted, relative to the largest logit.
TOLERANCE = 1e-4


def check_parity(model: nn.Module, folder: Path, base: OnnxBase) -> None:
    """Raises `BackendError` where a logit differs by more than `TOLERANCE`; of padded tokens nothing is asked."""
    session = Session(folder, providers=["CPUExecutionProvider"])
    kinds = {"logits": _logits, "decoder": _decoder, "encoder-decoder": _encoder_decoder}
    with evaluating(model), torch.no_grad():
        for what, expected, found in kinds[base.kind](model, session, min(base.max_tokens or 16, 16)):
            difference = float(np.abs(found - expected).max(initial=0.0)) if found.shape == expected.shape else np.inf
            if not difference <= TOLERANCE * (1 + float(np.abs(expected).max(initial=0.0))):
                raise BackendError(
                    f"the exported graph does not compute what {type(model).__name__} does: for {what} the logits differ "
                    f"by {difference:.3g}; try another version of torch, transformers or onnxscript"
                )


def _logits(model: nn.Module, session: Session, longest: int) -> Iterator[tuple[str, Array, Array]]:
    for batch, tokens in ((1, 2), (3, 5), (2, longest)):
        inputs = sample(model, batch, tokens, padded=1 if batch > 1 else 0)
        expected = model(**inputs)["logits"].float().numpy()
        yield f"{batch} texts of {tokens} tokens", expected, session.run(_arrays(inputs))["logits"]


def _decoder(model: nn.Module, session: Session, longest: int) -> Iterator[tuple[str, Array, Array]]:
    """At once, and again in two steps; `apart` is where the second begins."""
    for batch, tokens, apart, left in ((1, 2, 1, False), (3, 5, 3, True), (2, longest, longest - 1, False)):
        inputs = sample(model, batch, tokens, padded=1 if batch > 1 and left else 0, left=left)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        known = {"position_ids": positions(mask, tokens)} if takes_positions(model) else {}
        expected = model(input_ids=ids, attention_mask=mask, **known)["logits"].float().numpy()
        real = mask.numpy().astype(bool)
        whole = session.run({"input_ids": ids, "attention_mask": mask})["logits"]
        yield f"{batch} texts of {tokens} tokens", expected[real], whole[real]
        first = session.run({"input_ids": ids[:, :apart], "attention_mask": mask[:, :apart]})
        past = {PAST + name.removeprefix(PRESENT): value for name, value in first.items() if name != "logits"}
        second = session.run({"input_ids": ids[:, apart:], "attention_mask": mask, **past})["logits"]
        yield f"{tokens - apart} tokens behind {apart} in the cache", expected[:, apart:], second


def _encoder_decoder(model: nn.Module, session: Session, longest: int) -> Iterator[tuple[str, Array, Array]]:
    for batch, text, tokens, apart in ((1, 2, 2, 1), (3, 5, 4, 1), (2, longest, 5, 3)):
        inputs = sample(model, batch, text, padded=1 if batch > 1 else 0)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        said = sample(model, batch, tokens)["input_ids"]
        expected = model(**inputs, decoder_input_ids=said)["logits"].float().numpy()
        yield (
            f"{batch} texts of {text} tokens",
            expected,
            session.run({**_arrays(inputs), "decoder_input_ids": said})["logits"],
        )
        first = session.run({**_arrays(inputs), "decoder_input_ids": said[:, :apart]})
        past = {PAST + name.removeprefix(PRESENT): value for name, value in first.items() if name != "logits"}
        second = session.run({**_arrays(inputs), "decoder_input_ids": said[:, apart:], **past})["logits"]
        yield f"{tokens - apart} tokens behind {apart} in the cache", expected[:, apart:], second


def _arrays(inputs: Any) -> dict[str, Array]:
    return {name: value.numpy() for name, value in inputs.items()}
