"""From one call of a Hugging Face model to an ONNX file with one mark per patch slot (`torch.onnx.export`, dynamic axes)."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xpatch.errors import BackendError, MismatchError
from xpatch.exporters._backend import require
from xpatch.exporters.calls import Call
from xpatch.exporters.slots import Slot
from xpatch.models.readers import Reader
from xpatch.models.surgery import Surgery

_LARGE = 1_500_000_000  # bytes of weights; protobuf ends at 2 GiB, so more goes beside the graph


class _Marked(nn.Module):
    """A call of the model, adding one mark `[1, 1, D_out]` per slot to y and returning x of every slot beside the outputs.

    reader: how the head reads; its last layer then computes that row alone, and x of a slot there is `[B, 1, D]`.
    flat: modules that see the tokens of all rows in one axis, `[B T, D]` (OPT's).
    """

    def __init__(self, model: nn.Module, call: Call, slots: tuple[Slot, ...], reader: Reader | None = None) -> None:
        super().__init__()
        self.model, self.call, self.slots, self.reader = model, call, slots, reader
        self.reads = tuple(dict.fromkeys(slot.reads for slot in slots))
        self.flat: frozenset[str] = frozenset()

    def forward(self, inputs: tuple[torch.Tensor, ...], marks: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen: dict[str, torch.Tensor] = {}
        given = dict(zip(self.call.inputs, inputs, strict=True))
        with Surgery() as surgery:
            if self.reader is not None:
                self._narrow(surgery, self.reader, given["input_ids"])
            batch = inputs[0].shape[0]
            for name in self.reads:

                def see(module: nn.Module, args: Any, name: str = name) -> None:
                    x = args[0]
                    seen[name] = x.view(batch, -1, x.shape[-1]) if name in self.flat else x

                surgery.before(self.model.get_submodule(name), see)
            for slot, mark in zip(self.slots, marks, strict=True):

                def add(
                    module: nn.Module, args: Any, y: Any, mark: Any = mark, flat: bool = slot.reads in self.flat
                ) -> Any:
                    return (y.view(batch, -1, y.shape[-1]) + mark).view(y.shape) if flat else y + mark

                surgery.after(self.model.get_submodule(slot.adds), add)
            if self.reader is not None:
                self._widen(surgery, self.reader, given["input_ids"])
            found = self.call.compute(self.model, given)
        unseen = [slot.site for slot in self.slots if slot.reads not in seen]
        if unseen:
            raise MismatchError(
                f"{', '.join(unseen)}: not computed by the graph {self.call.graph!r}, so patches have no place there; name other sites"
            )
        return *found, *(seen[name] for name in self.reads)

    def _narrow(self, surgery: Surgery, reader: Reader, ids: torch.Tensor) -> None:
        kept = reader.one(self.model, ids, ids)

        def narrow(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return (
                tuple(kept.narrow(x) if kept.fits(x) else x for x in args),
                {name: kept.narrow(x) if kept.fits(x) else x for name, x in kwargs.items()},
            )

        for segment in reader.segments:
            surgery.before(self.model.get_submodule(segment.narrow), narrow, kwargs=True)

    def _widen(self, surgery: Surgery, reader: Reader, ids: torch.Tensor) -> None:
        """After the marks: they are added to the read row alone."""
        kept = reader.one(self.model, ids, ids)

        def widen(module: nn.Module, args: Any, output: Any) -> Any:
            return (kept.widen(output[0]), *output[1:]) if isinstance(output, tuple) else kept.widen(output)

        for segment in reader.segments:
            surgery.after(self.model.get_submodule(segment.widen), widen)


def trace(
    model: nn.Module, call: Call, slots: tuple[Slot, ...], folder: Path, opset: int, reader: Reader | None = None
) -> tuple[Any, dict[str, str], dict[str, str]]:
    """Write the marked graph of one call to its file in `folder`; return it as a ModelProto, with the names of x and mark by slot prefix.

    slots: those of this graph. Weights above 1.5 GB lie beside the graph and are not loaded again. Raises `MismatchError` for a model
    that cannot be called or whose sites do not see `[B, T, D]`, `BackendError` when the exporter fails.
    """
    require("onnxscript")
    onnx = require("onnx")
    wrapper = _Marked(model, call, slots, reader)
    inputs = tuple(call.sample[name] for name in call.inputs)
    marks = tuple(torch.zeros(1, 1, slot.width_out) for slot in slots)
    with evaluating(model), torch.no_grad():
        _check_shapes(model, wrapper, inputs, marks)
        moving = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in call.inputs.items()}
        with _quiet():
            try:
                program = torch.onnx.export(
                    wrapper,
                    (inputs, marks),
                    input_names=[*call.inputs, *(f"xpatch_mark_{i}" for i in range(len(marks)))],
                    output_names=[*call.outputs, *(f"xpatch_x_{i}" for i in range(len(wrapper.reads)))],
                    dynamic_shapes=(tuple(moving.values()), tuple({} for _ in marks)),
                    opset_version=opset,
                    dynamo=True,
                    verbose=False,
                )
                assert program is not None  # with dynamo=True it never is
                large = sum(value.numel() * value.element_size() for value in model.state_dict().values()) > _LARGE
                program.save(str(folder / call.file), external_data=large)
            except Exception as error:
                raise BackendError(
                    f"torch.onnx could not export {type(model).__name__} (torch {torch.__version__}): {_reason(error)}; "
                    "try another version of torch, transformers or onnxscript"
                ) from error
    proto = onnx.load(str(folder / call.file), load_external_data=False)
    _name_axes(proto.graph, call)
    copies = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Identity"}
    reads = {name: f"xpatch_x_{number}" for number, name in enumerate(wrapper.reads)}
    x_of = {slot.prefix: copies.get(reads[slot.reads], reads[slot.reads]) for slot in slots}
    kept = [value for value in proto.graph.output if value.name not in reads.values()]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    return proto, x_of, {slot.prefix: f"xpatch_mark_{i}" for i, slot in enumerate(slots)}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _reason(error: Exception) -> str:
    """What went wrong, out of the exporter's pages of advice."""
    text = str(error).split("## Exception summary")[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:4])[:300] if lines else type(error).__name__


def _name_axes(graph: Any, call: Call) -> None:
    """The exporter numbers the dynamic axes; they get the names that `call` gives them."""
    names: dict[str, str] = {}
    known: Mapping[str, Mapping[int, str]] = {**call.inputs, **call.outputs}
    for value in (*graph.input, *graph.output):
        for axis, name in known.get(value.name, {}).items():
            names.setdefault(value.type.tensor_type.shape.dim[axis].dim_param, name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _check_shapes(
    model: nn.Module, wrapper: _Marked, inputs: tuple[torch.Tensor, ...], marks: tuple[torch.Tensor, ...]
) -> None:
    other = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"})
    if other:
        raise MismatchError(
            f"{type(model).__name__}: expected fp32 weights, found {', '.join(other)}; export it in fp32 (model.float())"
        )
    call = wrapper.call
    batch = inputs[0].shape[0]
    try:
        every = _Marked(model, call, wrapper.slots)(inputs, marks)[len(call.outputs) :]
        rows = batch * call.tokens
        wrapper.flat = frozenset(
            name for name, x in zip(wrapper.reads, every, strict=True) if x.ndim == 2 and len(x) == rows
        )
        found = wrapper(inputs, marks)[len(call.outputs) :]
    except MismatchError:
        raise
    except Exception as error:
        raise MismatchError(
            f"{type(model).__name__} cannot be called on {', '.join(call.inputs)} of shape {list(inputs[0].shape)}: {error}"
        ) from error
    for slot in wrapper.slots:
        x = found[wrapper.reads.index(slot.reads)]
        tokens = x.shape[1] if x.ndim == 3 and wrapper.reader is not None and x.shape[1] == 1 else call.tokens
        if tuple(x.shape) != (batch, tokens, slot.width_in) or x.dtype != torch.float32:
            raise MismatchError(
                f"slot {slot.site!r}: expected fp32 inputs [batch, tokens, {slot.width_in}], found {x.dtype} {list(x.shape)}; "
                "export a model in fp32 (model.float()) at layers that see every token"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own warnings and log lines are about its insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
