"""Editors: functions `(model, tokenizer, requests) -> PatchSet` that leave the model bit-identical."""

from xpatch.editors.base import MethodInfo, edit, methods

__all__ = ["MethodInfo", "edit", "methods"]
