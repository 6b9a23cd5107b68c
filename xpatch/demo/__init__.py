"""`xpatch demo`: the whole job on the bundled verifier, from wrong answers to a patch folder, ONNX files and a report."""

from __future__ import annotations

from xpatch.demo.story import run

__all__ = ["run"]
