"""`quantize_base`: an exported base in int8, its patch slots in fp32.

The base's linear layers go through ONNX Runtime's `quantize_dynamic`. Nodes of a slot are left out by name: with their empty default
tensors they would be taken for constants, and no patch would act any more.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xpatch._version import __version__
from xpatch.errors import BackendError, FormatError, MismatchError, XpatchError
from xpatch.exporters._backend import require
from xpatch.exporters._written import written_together
from xpatch.exporters.description import CONFIG_FILE, METADATA_KEY, OnnxBase, read_base
from xpatch.exporters.embeddings import quantize_embeddings

INT8 = "int8"


def quantize_base(base_folder: str | Path, out: str | Path) -> Path:
    """Write the base that `export_base` wrote to `base_folder` in int8 to the folder `out`, and return it.

    Weights of linear layers: 7 bits of int8, a scale for each output channel, for on processors without VNNI products of 8 bits overflow;
    what goes into them: uint8, a scale for each call, so an answer may depend a little on the other texts of its batch. Embeddings: int8, a
    scale for each row. Patches, and what they read and add to, stay in fp32, under the same names: patch sets and adapters for the one base
    are for the other. Everything else of the folder (the tokenizer) is copied. Needs about four times the base in memory.

    The folder appears as a whole or not at all; an earlier export there is replaced. Raises `FormatError` (a folder that is no base, or
    damaged), `MismatchError` (quantised already), `BackendError` (a package is missing, or ONNX Runtime cannot quantise this graph),
    `XpatchError` (a folder with something else in it, or the base's own).
    """
    onnx = require("onnx")
    require("onnxruntime")
    require("onnxruntime.quantization")
    base_folder, out = Path(base_folder), Path(out)
    base = read_base(base_folder)
    if base.quantized is not None:
        raise MismatchError(
            f"{base_folder} is quantised already ({base.quantized}); give the folder that `xpatch export base` wrote"
        )
    if out.resolve() == base_folder.resolve():
        raise XpatchError(f"{out} is the base itself; name another folder, so that the fp32 base is kept")
    made = base.model_copy(update={"quantized": INT8, "xpatch": __version__})
    graphs = [base_folder / graph.file for graph in base.graphs.values()]
    with written_together(out, CONFIG_FILE) as temporary:
        large: set[Path] = set()
        for path in graphs:
            model = _read(onnx, path, base)
            beside = _beside(onnx, model, path)
            large |= beside
            _quantize(model, temporary / path.name, base, external=bool(beside))
            del model
            _finish(onnx, path, temporary / path.name, made)
        for file in base_folder.iterdir():
            if file.is_file() and file.name != CONFIG_FILE and file not in graphs and file not in large:
                shutil.copyfile(file, temporary / file.name)
        (temporary / CONFIG_FILE).write_text(made.to_json(), encoding="utf-8")
    return out


def _read(onnx: Any, path: Path, base: OnnxBase) -> Any:
    """The graph without its weights that lie beside it. Raises `FormatError` where it is not the described one."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # a missing file, or what protobuf raises
        raise FormatError(f"{path} cannot be read ({_first(error)}); export the base again") from None
    if {item.key: item.value for item in model.metadata_props}.get(METADATA_KEY) != base.digest:
        raise FormatError(f"{path} and the description beside it are not of one export; export the base again")
    return model


def _beside(onnx: Any, model: Any, path: Path) -> set[Path]:
    """Load the weights that lie beside the graph; the files they come from."""
    files = {
        path.parent / item.value
        for tensor in model.graph.initializer
        for item in tensor.external_data
        if item.key == "location"
    }
    if files:
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except Exception as error:  # a missing or short file, or one outside the folder
            raise FormatError(
                f"{path}: the weights beside it cannot be read ({_first(error)}); export the base again"
            ) from None
    return files


def _quantize(model: Any, out: Path, base: OnnxBase, *, external: bool) -> None:
    tools = require("onnxruntime.quantization")
    prefixes = tuple(f"{slot.prefix}." for slot in base.slots)
    quantize_embeddings(model.graph, prefixes)
    weights = {tensor.name for tensor in model.graph.initializer}
    # The tools transpose some weights, and then the shapes that the exporter noted for them are found to be wrong.
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    try:
        with _quiet():
            tools.quantize_dynamic(
                model,
                out,
                op_types_to_quantize=["MatMul"],  # a Gemm of constants becomes one before
                per_channel=True,
                reduce_range=True,
                weight_type=tools.QuantType.QInt8,
                nodes_to_exclude=[node.name for node in model.graph.node if node.name.startswith(prefixes)],
                use_external_data_format=external,
            )
    except Exception as error:  # the tools raise many kinds
        raise BackendError(
            f"ONNX Runtime {require('onnxruntime').__version__} cannot quantise {out.name}: {_first(error)}; serve the base in fp32, or try "
            "another version of onnxruntime"
        ) from error


def _finish(onnx: Any, before: Path, path: Path, made: OnnxBase) -> None:
    """Name the new description in the graph, once the slots are found as they were and the graph runs."""
    old, new = (onnx.load(str(file), load_external_data=False) for file in (before, path))
    _unused_inputs(old.graph, new.graph, made)
    if _slots(old, made) != _slots(new, made):
        raise BackendError(
            f"{path.name}: quantising changed the patch slots; try another version of onnxruntime, or serve the base in fp32"
        )
    onnx.helper.set_model_props(new, {METADATA_KEY: made.digest})
    new.producer_name, new.producer_version = "xpatch", __version__
    onnx.save(new, str(path))
    onnx.checker.check_model(str(path))


def _unused_inputs(old: Any, new: Any, base: OnnxBase) -> None:
    """The tools drop what no node reads, and so the input that an adapter's ledger comes under."""
    there = {value.name for value in new.input}
    missing = {value.name for value in old.input if value.name in base.optional_inputs} - there
    new.input.extend(value for value in old.input if value.name in missing)
    new.initializer.extend(tensor for tensor in old.initializer if tensor.name in missing)


def _slots(model: Any, base: OnnxBase) -> Any:
    """What patches need of a graph: their nodes with all inputs, and the inputs that are optional."""
    prefixes = tuple(f"{slot.prefix}." for slot in base.slots)
    nodes = sorted(
        (node.op_type, tuple(node.input), tuple(node.output))
        for node in model.graph.node
        if node.name.startswith(prefixes)
    )
    inputs = {value.name: value.type.SerializeToString() for value in model.graph.input}
    optional = {
        tensor.name: (tensor.data_type, tuple(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.name in base.optional_inputs
    }
    return nodes, inputs, optional


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tools log their advice to the root logger, and would install a handler there."""
    root, silent = logging.getLogger(), logging.NullHandler()
    disabled = root.manager.disable
    root.addHandler(silent)
    logging.disable(max(disabled, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
