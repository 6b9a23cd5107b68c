"""The activation study on a tiny model."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from xpatch.benchmarks import activation


@pytest.mark.usefixtures("quick")
def test_points_and_chart(model, tokenizer, protocol, tmp_path):
    result = activation.run(
        tmp_path / "a.json", counts=(2, 4, None), model=model, tokenizer=tokenizer, protocol=protocol, progress=False
    )
    assert json.loads((tmp_path / "a.json").read_text())["points"] == json.loads(json.dumps(result["points"]))
    assert {(p["activation"], p["edits"]) for p in result["points"]} >= {("gelu", 2), ("relu", 2), ("relu", 4)}
    for point in result["points"]:
        value, low, high = point["unchanged"]
        assert low <= value <= high <= 100
    root = ElementTree.fromstring((tmp_path / "a.svg").read_text())
    assert root.tag.endswith("svg") and len(root.findall(".//{*}polyline")) == 6
