"""`export_base`: a model as one ONNX graph whose patches are optional inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from xpatch._version import __version__
from xpatch.errors import MismatchError
from xpatch.exporters._backend import require
from xpatch.exporters._bare import check_bare
from xpatch.exporters._written import written_together
from xpatch.exporters.calls import Plan, input_names, plan, plan_kind
from xpatch.exporters.description import CONFIG_FILE, METADATA_KEY, PRESENT, Graph, OnnxBase
from xpatch.exporters.graph import insert_slots
from xpatch.exporters.parity import check_parity
from xpatch.exporters.slots import Slot, prefixes
from xpatch.exporters.trace import evaluating, trace
from xpatch.models.anatomy import ffn_site, final_ffn, linear
from xpatch.models.lengths import position_limit
from xpatch.models.readers import Reader, reader_of
from xpatch.ops.reference import canonical_activation
from xpatch.patches.identity import identify


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
    """Write the graphs, `xpatch_onnx.json` and the tokenizer's files to `folder`, and return it.

    model: a Hugging Face text model with logits, in fp32, without patches; it is left as it was. Classifiers and masked language models
    become `model.onnx`; decoders (GPT-2, BLOOM, OPT, Llama, Qwen and others) `model.onnx` with a cache of keys and values, which may be
    empty; encoder-decoders (T5, mT5, BART, Marian, M2M100) `encoder_model.onnx` and `decoder_model.onnx`.
    sites: FFNs that get a neuron slot (default: the final one). linears: linear layers that get a low-rank slot (default: the down projection of those FFNs). activation: of the neurons; fixed in the graph, so a set with
    another needs another base. languages: fixes the order of the language masks' rows; None lets each adapter bring its own;
    an empty sequence leaves the mask inputs out, which is a little faster. head_only: the last layer computes only the row that a
    classifier's head reads, patches included, where that row is known (`xpatch.optimize` does the same in PyTorch); False computes all.

    Everything is written to a temporary folder, compared with the model on several shapes, and moved into place; an earlier
    export in `folder` is replaced as a whole. Raises `MismatchError` (a model or site that does not fit), `ConflictError` (patches
    are applied), `BackendError` (a package is missing or the exporter failed), `XpatchError` (a folder with something else in it).
    """
    onnx = require("onnx")
    require("onnxruntime")
    model = getattr(model, "_orig_mod", model)
    check_bare(model)
    activation = canonical_activation(activation)
    config: Any = getattr(model, "config", None)
    labels = getattr(config, "id2label", None) or {}
    with evaluating(model):
        planned = plan(model)
    reader = _reader(model) if head_only and planned.kind == "logits" else None
    slots = _slots(model, activation, sites, linears, masked=languages is None or len(languages) > 0)
    base = OnnxBase(
        xpatch=__version__,
        architecture=type(model).__name__,
        kind=planned.kind,
        graphs={
            call.graph: Graph(file=call.file, inputs=tuple(call.inputs), outputs=tuple(call.outputs))
            for call in planned.calls
        },
        inputs=input_names(model) if planned.kind == "logits" else ("input_ids", "attention_mask"),
        outputs=("logits", *(PRESENT + one.name for one in planned.cache)),
        cache=planned.cache,
        activation=activation,
        slots=slots,
        languages=tuple(languages) if languages is not None else None,
        identity=identify(model, tokenizer),
        labels=tuple(str(labels[key]) for key in sorted(labels)) if planned.kind == "logits" else (),
        max_tokens=position_limit(model),
        opset=opset,
        head_only=reader is not None,
        **_special_tokens(model, planned),
    )
    with written_together(Path(folder), CONFIG_FILE) as temporary:
        for call in planned.calls:
            own = tuple(slot for slot in slots if slot.graph == call.graph)
            proto, x_of, marks = trace(model, call, own, temporary, opset, reader)
            insert_slots(proto, own, x_of, marks)
            onnx.helper.set_model_props(proto, {METADATA_KEY: base.digest})
            proto.producer_name, proto.producer_version = "xpatch", __version__
            onnx.save(proto, str(temporary / call.file))
            onnx.checker.check_model(str(temporary / call.file))
        (temporary / CONFIG_FILE).write_text(base.to_json(), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        check_parity(model, temporary, base)
    return Path(folder)


def _special_tokens(model: Any, planned: Plan) -> dict[str, Any]:
    """What `generate` of transformers begins and ends with, and pads with."""
    config: Any = getattr(model, "generation_config", None) if planned.kind != "logits" else None
    config = config or model.config
    ends = getattr(config, "eos_token_id", None)
    start = getattr(config, "decoder_start_token_id", None)
    padding = getattr(config, "pad_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    if padding is None and planned.kind != "logits" and ends:
        padding = ends[0]
    return {
        "pad_token": int(padding or 0),
        "start_token": start if planned.kind == "encoder-decoder" else None,
        "end_tokens": tuple(ends) if planned.kind != "logits" else (),
    }


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
    graph = _graph_of(model)
    slots = [
        Slot(
            kind="neurons", site=ffn.name, prefix=prefix, reads=ffn.up, adds=ffn.down,
            width_in=ffn.width, width_out=ffn.width, activation=activation, masked=masked, graph=graph(ffn.name),
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
                graph=graph(name),
            )
        )
    return tuple(slots)


def _graph_of(model: Any) -> Callable[[str], str]:
    """Which graph computes a module, by its name."""
    if plan_kind(model) != "encoder-decoder":
        return lambda name: "model"
    encoder = model.get_encoder()
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    return lambda name: "encoder" if name.startswith(f"{prefix}.") else "decoder"
