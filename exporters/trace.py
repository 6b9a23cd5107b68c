"""From a Hugging Face model to an ONNX file with one mark per patch slot (`torch.onnx.export`, dynamic batch and tokens)."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xpatch.errors import BackendError, MismatchError
from xpatch.exporters._backend import require
from xpatch.exporters.slots import MODEL_FILE, Slot
from xpatch.models.readers import Reader
from xpatch.models.surgery import Surgery

_LARGE = 1_500_000_000  # bytes of weights; protobuf ends at 2 GiB, so more goes beside the graph
_SAMPLE = (2, 7)  # batch and tokens of the traced call; 1 would be taken for a constant


class _Marked(nn.Module):
    """The model, adding one mark `[1, 1, D_out]` per slot to y and returning x of every slot beside the logits.

    reader: how the head reads; its last layer then computes that row alone, and x of a slot there is `[B, 1, D]`.
    """

    def __init__(
        self, model: nn.Module, names: tuple[str, ...], slots: tuple[Slot, ...], reader: Reader | None = None
    ) -> None:
        super().__init__()
        self.model, self.names, self.slots, self.reader = model, names, slots, reader
        self.reads = tuple(dict.fromkeys(slot.reads for slot in slots))

    def forward(self, inputs: tuple[torch.Tensor, ...], marks: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen: dict[str, torch.Tensor] = {}
        given = dict(zip(self.names, inputs, strict=True))
        with Surgery() as surgery:
            if self.reader is not None:
                self._narrow(surgery, self.reader, given["input_ids"])
            for name in self.reads:
                surgery.before(
                    self.model.get_submodule(name), lambda module, args, name=name: seen.__setitem__(name, args[0])
                )
            for slot, mark in zip(self.slots, marks, strict=True):
                surgery.after(self.model.get_submodule(slot.adds), lambda module, args, y, mark=mark: y + mark)
            if self.reader is not None:
                self._widen(surgery, self.reader, given["input_ids"])
            logits = self.model(**given)["logits"]
        return logits, *(seen[name] for name in self.reads)

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


def input_names(model: nn.Module) -> tuple[str, ...]:
    """The token inputs of a model: ids, mask, and token types where the model has more than one."""
    names = ["input_ids", "attention_mask"]
    accepted = inspect.signature(model.forward).parameters
    if "token_type_ids" in accepted and (getattr(getattr(model, "config", None), "type_vocab_size", 1) or 1) > 1:
        names.append("token_type_ids")
    missing = [name for name in names if name not in accepted]
    if missing:
        raise MismatchError(
            f"{type(model).__name__} cannot be exported: its forward takes no {', '.join(missing)}; only text models can"
        )
    return tuple(names)


def sample(model: nn.Module, batch: int, tokens: int, padded: int = 0) -> dict[str, torch.Tensor]:
    """A call of random token ids `[batch, tokens]`, the last row's last `padded` tokens being padding."""
    config: Any = getattr(model, "config", None)
    padding = getattr(config, "pad_token_id", None) or 0
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(config.vocab_size), (batch, tokens), generator=draw)
    ids[ids == padding] = (padding + 1) % int(config.vocab_size)
    mask = torch.ones_like(ids)
    if padded:
        ids[-1, -padded:], mask[-1, -padded:] = padding, 0
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: every[name] for name in input_names(model)}


def max_tokens(model: nn.Module) -> int | None:
    """The longest text the positions of a model allow, special tokens included; None where the configuration does not say."""
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is None:
        return None
    # RoBERTa counts positions from behind the padding index, and so has fewer than its table has rows.
    offset = any(
        getattr(module, "padding_idx", None)
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
    )
    return int(limit) - (int(getattr(config, "pad_token_id", 0) or 0) + 1 if offset else 0)


def trace(
    model: nn.Module, slots: tuple[Slot, ...], folder: Path, opset: int, reader: Reader | None = None
) -> tuple[Any, dict[str, str], dict[str, str]]:
    """Write the marked graph to `folder/model.onnx`; return it as a ModelProto, with the names of x and mark by slot prefix.

    Weights above 1.5 GB lie beside the graph and are not loaded again. Raises `MismatchError` for a model that cannot be called
    or whose sites do not see `[B, T, D]`, `BackendError` when the exporter fails.
    """
    require("onnxscript")
    onnx = require("onnx")
    wrapper = _Marked(model, input_names(model), slots, reader)
    inputs = sample(model, *_SAMPLE, padded=2)
    marks = tuple(torch.zeros(1, 1, slot.width_out) for slot in slots)
    with evaluating(model), torch.no_grad():
        _check_shapes(model, wrapper, inputs, marks)
        batch, tokens = (
            torch.export.Dim("batch", min=1),
            torch.export.Dim("tokens", min=1, max=max_tokens(model) or 1 << 20),
        )
        with _quiet():
            try:
                program = torch.onnx.export(
                    wrapper,
                    (tuple(inputs.values()), marks),
                    input_names=[*inputs, *(f"xpatch_mark_{i}" for i in range(len(marks)))],
                    output_names=["logits", *(f"xpatch_x_{i}" for i in range(len(wrapper.reads)))],
                    dynamic_shapes=(tuple({0: batch, 1: tokens} for _ in inputs), tuple({} for _ in marks)),
                    opset_version=opset,
                    dynamo=True,
                    verbose=False,
                )
                assert program is not None  # with dynamo=True it never is
                large = sum(value.numel() * value.element_size() for value in model.state_dict().values()) > _LARGE
                program.save(str(folder / MODEL_FILE), external_data=large)
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise BackendError(
                    f"torch.onnx could not export {type(model).__name__} (torch {torch.__version__}): {reason[0][:300]}; "
                    "try another version of torch, transformers or onnxscript"
                ) from error
    proto = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
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


def _check_shapes(
    model: nn.Module, wrapper: _Marked, inputs: Mapping[str, torch.Tensor], marks: tuple[torch.Tensor, ...]
) -> None:
    other = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"})
    if other:
        raise MismatchError(
            f"{type(model).__name__}: expected fp32 weights, found {', '.join(other)}; export it in fp32 (model.float())"
        )
    try:
        _, *found = wrapper(tuple(inputs.values()), marks)
    except Exception as error:
        raise MismatchError(
            f"{type(model).__name__} cannot be called on {', '.join(inputs)} of shape {list(_SAMPLE)}: {error}"
        ) from error
    for slot in wrapper.slots:
        x = found[wrapper.reads.index(slot.reads)]
        tokens = x.shape[1] if x.ndim == 3 and wrapper.reader is not None and x.shape[1] == 1 else _SAMPLE[1]
        if tuple(x.shape) != (_SAMPLE[0], tokens, slot.width_in) or x.dtype != torch.float32:
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
