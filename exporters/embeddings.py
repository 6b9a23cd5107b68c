"""Embedding tables in int8 with a scale for each row: most of a multilingual model's bytes, and one outlier costs its own row alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from xpatch.exporters._backend import require


def quantize_embeddings(graph: Any, excluded: tuple[str, ...]) -> list[str]:
    """Change `graph` (an onnx.GraphProto) in place; the names of the tables.

    A table is a constant `[V, D]` in fp32 that only Gathers along its rows read, none of which has a name beginning with one of `excluded`:
    `table[ids]` becomes `float(int8 table[ids]) * scale[ids]`, scale `[V, 1]`.
    """
    onnx = require("onnx")
    inputs = {value.name for value in graph.input}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    tables = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.name not in inputs
        and len(tensor.dims) == 2
        and tensor.data_type == onnx.TensorProto.FLOAT
        and all(_by_row(node, tensor.name, excluded) for node in users.get(tensor.name, ()))
        and tensor.name in users
    }
    found = []
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in tables:
            found.append(node)
            continue
        table, ids, result = node.input[0], node.input[1], node.output[0]
        rows, scales, cast = f"{result}_int8", f"{result}_scale", f"{result}_cast"
        make = onnx.helper.make_node
        found += [
            make("Gather", [f"{table}_int8", ids], [rows], name=f"{node.name}_int8"),
            make("Cast", [rows], [cast], name=f"{node.name}_cast", to=onnx.TensorProto.FLOAT),
            make("Gather", [f"{table}_scale", ids], [scales], name=f"{node.name}_scale"),
            make("Mul", [cast, scales], [result], name=f"{node.name}_mul"),
        ]
    del graph.node[:]
    graph.node.extend(found)
    for name, tensor in tables.items():
        values, scale = quantize_rows(onnx.numpy_helper.to_array(tensor))
        graph.initializer.remove(tensor)
        graph.initializer.append(onnx.numpy_helper.from_array(values, f"{name}_int8"))
        graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
    return list(tables)


def quantize_rows(table: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """fp32 `[V, D]` -> int8 `[V, D]` and scale fp32 `[V, 1]`: off by at most half a scale, the row's largest value over 127."""
    largest = np.maximum(table.max(1, keepdims=True), -table.min(1, keepdims=True))
    scale = np.maximum(largest / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return np.clip(np.rint(table / scale), -127, 127).astype(np.int8), scale


def _by_row(node: Any, table: str, excluded: tuple[str, ...]) -> bool:
    axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis == 0 and not node.name.startswith(excluded)
