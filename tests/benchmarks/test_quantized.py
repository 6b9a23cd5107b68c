"""The study of int8 bases on a tiny model."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("onnxruntime")

from xpatch.benchmarks import quantized


def test_sides_and_measures(model, tokenizer, protocol, tmp_path):
    memory = {language: [probe.text for probe in found] for language, found in protocol.locality_train.items()}
    result = quantized.run(
        tmp_path / "q.json", model=model, tokenizer=tokenizer, protocol=protocol, progress=False, steps=5, memory=memory
    )
    assert list(result["sides"]) == ["torch", "ort", "int8", "int8-defaults"]
    sides = result["sides"]
    for found in sides.values():
        for name in quantized.HEADS:
            assert set(found[name]) == {"en", "de", "zh", "mean"} and all(
                0 <= one <= 100 for one in found[name].values()
            )
    for name in ("changed_base", "changed_patched"):  # fp32 is fp32
        assert sides["torch"][name]["mean"] == sides["ort"][name]["mean"] == 0
    assert (
        sides["ort"]["edited"] == sides["torch"]["edited"] and sides["ort"]["unchanged"] == sides["torch"]["unchanged"]
    )
    assert sides["int8"]["bytes"] < sides["ort"]["bytes"] and sides["int8"]["alone"]["texts"] == 30
    assert json.loads((tmp_path / "q.json").read_text())["edits"] == result["edits"]
    shown = quantized.table(result)
    assert "| int8-defaults |" in shown and "int8, edits right" in shown
