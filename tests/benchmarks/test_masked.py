"""The study of language masks on a tiny model."""

from __future__ import annotations

import json

import torch

from xpatch.benchmarks import masked
from xpatch.benchmarks.trained_base import read_once

RUNS = (
    ("t-patcher", "own", None),
    ("mpn", "all", None),
    ("mpn-masked", "all", None),
    ("mpn-masked", "en+de", ("en", "de")),
)


def test_rows_seeds_and_geometry(model, tokenizer, protocol, tmp_path):
    memory = {language: [probe.text for probe in found] for language, found in protocol.locality_train.items()}
    settings = {
        "runs": RUNS,
        "seeds": (0, 1),
        "model": model,
        "tokenizer": tokenizer,
        "protocol": protocol,
        "memory": memory,
    }
    result = masked.run(tmp_path / "m.json", progress=False, steps=3, **settings)
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads(json.dumps(result))
    assert [(row["method"], row["trained_on"]) for row in result["rows"]] == [run[:2] for run in RUNS]
    for row in result["rows"]:
        assert set(row["clg_needed_any"]) == {"en", "de", "zh"}
        assert all(0 <= mean <= 100 and spread >= 0 for mean, spread in row["unchanged_train"].values())
    assert masked.run(tmp_path / "m.json", progress=False, steps=3, **settings)["rows"] == result["rows"]
    assert "mpn-masked | en+de" in masked.table(result)
    for found in result["geometry"]["languages"].values():
        assert 0 <= found["distance_masked"] <= found["distance"]  # least squares


def test_reading_once_changes_no_answer(model, tokenizer, protocol):
    once = read_once(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = tokenizer(
        [case.versions["en"].text for case in protocol.cases] + ["w1"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = model(**inputs).logits
        torch.testing.assert_close(once(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
        once.bert.encoder.layer[0].output.dense.weight.add_(1.0)  # the copy's alone
        assert not torch.allclose(once(**inputs).logits, wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
