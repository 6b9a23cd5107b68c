"""`export_base`: a model as one ONNX graph whose patches are optional inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xpatch._version import __version__
from xpatch.errors import BackendError, MismatchError
from xpatch.exporters._backend import require
from xpatch.exporters._bare import check_bare
from xpatch.exporters._written import written_together
from xpatch.exporters.graph import insert_slots
from xpatch.exporters.slots import CONFIG_FILE, METADATA_KEY, MODEL_FILE, OnnxBase, Slot, prefixes
from xpatch.exporters.trace import evaluating, input_names, max_tokens, sample, trace
from xpatch.models.anatomy import ffn_site, final_ffn, linear
from xpatch.models.readers import Reader, reader_of
from xpatch.ops.reference import canonical_activation
from xpatch.patches.identity import identify

#: Largest difference between the exported graph and the model that `export_base` accepts, relative to the largest logit.
TOLERANCE = 1e-4


def export_base(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    activation: str = "relu",
    sites: Sequence[str] | None = None,
    linears: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    head_only: bool = True,
    opset: int = 18,
) -> Path:
    """Write `model.onnx`, `xpatch_onnx.json` and the tokenizer's files to `folder`, and return it.

    model: a Hugging Face text model with logits, in fp32, without patches: BERT, XLM-R and GPT-2 sequence classifiers are
    tested. It is left as it was. sites: FFNs that get a neuron slot (default: the final one). linears: linear layers that get a
    low-rank slot (default: the down projection of those FFNs). activation: of the neurons; fixed in the graph, so a set with
    another needs another base. languages: fixes the order of the language masks' rows; None lets each adapter bring its own;
    an empty sequence leaves the mask inputs out, which is a little faster. head_only: the last layer computes only the row that a
    classifier's head reads, patches included, where that row is known (`xpatch.optimize` does the same in PyTorch); False computes all.

    Everything is written to a temporary folder, compared with the model on three shapes, and moved into place; an earlier
    export in `folder` is replaced as a whole. Raises `MismatchError` (a model or site that does not fit), `ConflictError` (patches
    are applied), `BackendError` (a package is missing or the exporter failed), `XpatchError` (a folder with something else in it).
    """
    onnx = require("onnx")
    require("onnxruntime")
    model = getattr(model, "_orig_mod", model)
    check_bare(model)
    activation = canonical_activation(activation)
    reader = _reader(model) if head_only else None
    slots = _slots(model, activation, sites, linears, masked=languages is None or len(languages) > 0)
    config: Any = getattr(model, "config", None)
    labels = getattr(config, "id2label", None) or {}
    base = OnnxBase(
        xpatch=__version__,
        architecture=type(model).__name__,
        inputs=input_names(model),
        outputs=("logits",),
        activation=activation,
        slots=slots,
        languages=tuple(languages) if languages is not None else None,
        identity=identify(model, tokenizer),
        labels=tuple(str(labels[key]) for key in sorted(labels)),
        max_tokens=max_tokens(model),
        pad_token=int(getattr(config, "pad_token_id", None) or 0),
        opset=opset,
        head_only=reader is not None,
    )
    with written_together(Path(folder), CONFIG_FILE) as temporary:
        proto, x_of, marks = trace(model, slots, temporary, opset, reader)
        insert_slots(proto, slots, x_of, marks)
        onnx.helper.set_model_props(proto, {METADATA_KEY: base.digest})
        proto.producer_name, proto.producer_version = "xpatch", __version__
        onnx.save(proto, str(temporary / MODEL_FILE))
        onnx.checker.check_model(str(temporary / MODEL_FILE))
        (temporary / CONFIG_FILE).write_text(base.to_json(), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        _check_parity(model, temporary / MODEL_FILE, base)
    return Path(folder)


def _reader(model: nn.Module) -> Reader | None:
    """How a classifier's head reads; None where that is not known, and for language models, whose every row may be asked for."""
    try:
        reader = reader_of(model)
    except MismatchError:
        return None
    return None if reader.reads == "kept" else reader


def _slots(
    model: nn.Module, activation: str, sites: Sequence[str] | None, linears: Sequence[str] | None, masked: bool
) -> tuple[Slot, ...]:
    ffns = [final_ffn(model)] if sites is None else [ffn_site(model, name) for name in dict.fromkeys(sites)]
    names = [ffn.down for ffn in ffns] if linears is None else list(dict.fromkeys(linears))
    if not ffns and not names:
        raise MismatchError(
            "expected at least one site or linear layer to put patches at, found none; name one, or leave both out"
        )
    for ffn in ffns:
        if ffn.experts:
            raise MismatchError(
                f"FFN {ffn.name!r} is a mixture of experts, found {ffn.experts} of them; expected an FFN of linear layers for a slot in "
                "the ONNX graph. Serve this model's patches with PyTorch, or name other sites"
            )
    unique = prefixes([*(ffn.name for ffn in ffns), *names])
    slots = [
        Slot(
            kind="neurons", site=ffn.name, prefix=prefix, reads=ffn.up, adds=ffn.down,
            width_in=ffn.width, width_out=ffn.width, activation=activation, masked=masked,
        )
        for ffn, prefix in zip(ffns, unique, strict=False)
    ]  # fmt: skip
    for name, prefix in zip(names, unique[len(ffns) :], strict=True):
        _, width_in, width_out = linear(model, name)
        slots.append(
            Slot(
                kind="lowrank",
                site=name,
                prefix=prefix,
                reads=name,
                adds=name,
                width_in=width_in,
                width_out=width_out,
                masked=masked,
            )
        )
    return tuple(slots)


def _check_parity(model: nn.Module, path: Path, base: OnnxBase) -> None:
    """With nothing fed, the graph is the model, also for shapes other than the traced one."""
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    longest = min(base.max_tokens or 16, 16)
    for batch, tokens in ((1, 2), (3, 5), (2, longest)):
        inputs = sample(model, batch, tokens, padded=1 if batch > 1 else 0)
        with evaluating(model), torch.no_grad():
            expected = model(**inputs)["logits"].float().numpy()
        found = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
        difference = float(np.abs(found - expected).max())
        if found.shape != expected.shape or not difference <= TOLERANCE * (1 + float(np.abs(expected).max())):
            raise BackendError(
                f"the exported graph does not compute what {type(model).__name__} does: for {batch} texts of {tokens} tokens the logits differ "
                f"by {difference:.3g}; try another version of torch, transformers or onnxscript"
            )
