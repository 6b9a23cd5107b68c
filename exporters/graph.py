"""Graph surgery on an exported base: marker inputs and outputs become patch slots made of standard ONNX operators.

The exporter was asked to add one extra input, a mark, to y of each slot. Here the mark is replaced by the slot's own
computation, so no optimisation of the exporter can have renamed or folded any of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xpatch.errors import BackendError
from xpatch.exporters._backend import require
from xpatch.exporters.slots import LANGUAGE, META, Slot, SlotTensor

_AXIS = "xpatch_axis"
_ZERO = "xpatch_zero"


class _Builder:
    """Collects nodes; each call names one operator and gives the name of its result."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray[Any, Any]] = {}

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        number = len(self.nodes)
        result = f"{self.prefix}.{number}"
        helper = require("onnx").helper
        self.nodes.append(
            helper.make_node(operator, list(inputs), [result], name=f"{self.prefix}.{operator}_{number}", **attributes)
        )
        return result

    def constant(self, value: float) -> str:
        name = f"xpatch_constant_{value:g}"
        self.constants[name] = np.asarray(value, np.float32)
        return name


def insert_slots(model: Any, slots: tuple[Slot, ...], x_of: Mapping[str, str], marks: Mapping[str, str]) -> None:
    """Change `model` (an onnx.ModelProto) in place.

    x_of: slot prefix -> value that holds x `[B, T, D_in]`. marks: slot prefix -> graph input that is added to y; it
    must be used by one Add. Raises `BackendError` when the exporter did something else with a mark.
    """
    onnx = require("onnx")
    graph = model.graph
    for slot in slots:
        mark = marks[slot.prefix]
        users = [(position, node) for position, node in enumerate(graph.node) if mark in node.input]
        if len(users) != 1 or users[0][1].op_type != "Add":
            found = ", ".join(node.op_type for _, node in users) or "nothing"
            raise BackendError(
                f"the exporter did not keep the place of {slot.site!r}: expected one Add of its mark, found {found}; "
                "try another version of torch or onnxscript"
            )
        position, add = users[0]
        builder = _Builder(slot.prefix)
        side = _side_path(builder, slot, x_of[slot.prefix])
        add.input[list(add.input).index(mark)] = side
        nodes = list(graph.node)
        del graph.node[:]
        graph.node.extend([*nodes[:position], *builder.nodes, *nodes[position:]])
        for name, value in builder.constants.items():
            _constant(graph, name, value)
    _constant(graph, _AXIS, np.asarray([1], np.int64))
    _constant(graph, _ZERO, np.asarray([0], np.int64))
    kept = [value for value in graph.input if value.name not in set(marks.values())]
    del graph.input[:]
    graph.input.extend(kept)
    optional = [tensor for slot in slots for tensor in slot.tensors.values()]
    if any(slot.masked for slot in slots):
        optional.append(SlotTensor(LANGUAGE, ("xpatch_rows",), np.zeros(1, np.int64)))
    optional.append(SlotTensor(META, ("xpatch_meta_bytes",), np.zeros(0, np.uint8)))
    for tensor in optional:
        kind = onnx.helper.np_dtype_to_tensor_dtype(tensor.default.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, kind, list(tensor.dims)))
        graph.initializer.append(onnx.numpy_helper.from_array(tensor.default, tensor.name))
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]  # the exporter notes where in the code each comes from, with this machine's paths


def _side_path(node: _Builder, slot: Slot, x: str) -> str:
    """`act(x ⊙ inner K + b) ⊙ select V ⊙ outer`, or the same without activation and bias for a low-rank slot: `[B, T, D_out]`."""
    first, last = slot.weights
    if slot.masked:
        x = node("Mul", x, _row(node, slot, "mask_inner"))
    hidden = node("MatMul", x, slot.name(first))
    if slot.kind == "neurons":
        hidden = _activate(node, node("Add", hidden, slot.name("bias")), slot.activation or "identity")
    hidden = node("Mul", hidden, node("Unsqueeze", slot.name("select"), _AXIS))
    side = node("MatMul", hidden, slot.name(last))
    return node("Mul", side, _row(node, slot, "mask_outer")) if slot.masked else side


def _row(node: _Builder, slot: Slot, key: str) -> str:
    """Each batch row's row of a mask, `[S, 1, D]`; S = 1 holds for the whole batch. A language without a row gets the first, of ones.

    All slots share the language index, but only those in use have more than that first row.
    """
    known = node("Less", LANGUAGE, node("Shape", slot.name(key), start=0, end=1))
    index = node("Where", known, LANGUAGE, _ZERO)
    return node("Unsqueeze", node("Gather", slot.name(key), index, axis=0), _AXIS)


def _activate(node: _Builder, z: str, activation: str) -> str:
    """The activations of `xpatch.ops.reference`, in operators that every opset has."""
    if activation == "relu":
        return node("Relu", z)
    if activation == "silu":
        return node("Mul", z, node("Sigmoid", z))
    if activation == "gelu":
        inner = node("Erf", node("Div", z, node.constant(2**0.5)))
    elif activation == "gelu_tanh":
        cube = node("Mul", node("Mul", node("Mul", z, z), z), node.constant(0.044715))
        inner = node("Tanh", node("Mul", node("Add", z, cube), node.constant((2 / np.pi) ** 0.5)))
    else:
        return z
    return node("Mul", node("Mul", z, node("Add", inner, node.constant(1.0))), node.constant(0.5))


def _constant(graph: Any, name: str, value: np.ndarray[Any, Any]) -> None:
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(require("onnx").numpy_helper.from_array(value, name))
