"""Exporters: a base model as one ONNX graph with optional patch inputs, patch sets as adapters, and a session for both.

    export_base(model, "onnx/", tokenizer=tokenizer)
    export_adapter(patches, "onnx/", "fixes.onnx_adapter")
    session = Session("onnx/").apply("fixes.onnx_adapter", name="fixes")
    session.run(tokenizer(["..."], return_tensors="np"), xpatch=Rows(patches="fixes"))["logits"]

    quantize_base("onnx/", "onnx-int8/")  # the same in int8, patches in fp32

    export_widened(model, patches, "wide/")  # a plain checkpoint; export_merged and export_peft hold deltas

ONNX needs `pip install "xpatch[onnx]"`; importing this package does not.
"""

from xpatch.exporters.adapter import export_adapter, read_adapter
from xpatch.exporters.base import export_base
from xpatch.exporters.checkpoints import export_merged, export_peft, export_widened
from xpatch.exporters.description import OnnxBase, read_base
from xpatch.exporters.quantized import quantize_base
from xpatch.exporters.session import Session
from xpatch.exporters.verify import Parity, first_rows, texts_of, verify, verify_sets

__all__ = [
    "OnnxBase",
    "Parity",
    "Session",
    "export_adapter",
    "export_base",
    "export_merged",
    "export_peft",
    "export_widened",
    "quantize_base",
    "read_adapter",
    "first_rows",
    "read_base",
    "texts_of",
    "verify",
    "verify_sets",
]
