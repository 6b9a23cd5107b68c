"""The gate study on a tiny model: every number is what serving the patches gives."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch

import xpatch
from xpatch.benchmarks import activation
from xpatch.benchmarks.activation_blocks import Neurons, many, trained
from xpatch.benchmarks.activation_leak import Gate, Rows, added, answers, leak
from xpatch.benchmarks.trained_base import Base


@pytest.fixture
def base(model, tokenizer):
    return Base(model, tokenizer, ("en", "de", "zh"))


def neurons(count: int, activation: str = "gelu", width: int = 32) -> Neurons:
    torch.manual_seed(0)
    keys, values = torch.randn(count, width) / width**0.5, 3 * torch.randn(count, width)
    return Neurons(keys, torch.full((count,), -1.0), values, activation, list(range(1, count + 1)))


@pytest.mark.usefixtures("quick")
def test_points_and_charts(base, protocol, tmp_path):
    memory = {language: [probe.text for probe in found] for language, found in protocol.locality_train.items()}
    settings = {
        "counts": (2, 4, 10),
        "wide_blocks": (),
        "source": base,
        "protocol": protocol,
        "memory": memory,
        "steps": 3,
    }
    result = activation.run(tmp_path / "a.json", factor_seeds=(0,), progress=False, keep_failed=True, **settings)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(result))
    assert {(p["gate"], p["edits"]) for p in result["points"]} == {
        (g, n) for g in activation.SERVED for n in (2, 4, 10)
    }
    for point in result["points"]:
        value, low, high = point["unchanged"]
        assert low <= value <= high <= 100 and point["patches"] <= 2 * point["edits"]  # two for a hard one
        quiet = point["gate"] in ("relu", "relu-whitened", "gelu-cut")
        assert (point["leak"]["mean"] == 0) == quiet and (not quiet or point["changed_by_leak_alone"] == 0)
        assert point["leak"]["mean"] <= point["leak"]["apart"]  # norms without cancellation bound the norm of the sum
    assert [(cell["sampler"], cell["gate"]) for cell in result["factors"]] == [
        ("own", "gelu"), ("own", "relu"), ("all", "gelu"), ("all", "relu")
    ]  # fmt: skip
    for name, panels in (("a.svg", 3), ("a_leak.svg", 1)):
        root = ElementTree.fromstring((tmp_path / name).read_text())
        assert root.tag.endswith("svg") and len(root.findall(".//{*}polyline")) >= panels
    blocks = sorted((tmp_path / "a.work").rglob("*.safetensors"))
    made = [path.stat().st_mtime_ns for path in blocks]
    again = activation.run(tmp_path / "a.json", factor_seeds=(0,), progress=False, keep_failed=True, **settings)
    assert blocks and again["points"] == result["points"] and again["factors"] == result["factors"]
    assert [path.stat().st_mtime_ns for path in blocks] == made  # read, not trained again


def test_answers_on_rows_are_those_of_the_served_patches(base, protocol):
    asked = [case.versions["en"].text for case in protocol.cases] + ["w1 w2", "w3"]
    found, some = Rows.read(base, asked), neurons(6)
    part = xpatch.PatchNeurons("bert.encoder.layer.1", some.keys, some.bias, some.values, "gelu")
    inputs = base.tokenizer(asked, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    for more, patches in ((None, None), (added(some, found.x), xpatch.PatchSet({"p": part}))):
        if patches is not None:
            xpatch.apply(base.model, patches, name="p")
        with torch.no_grad():
            wanted = base.model(**inputs).logits.argmax(-1)
        assert torch.equal(answers(base, found, None if more is None else more.loud + more.silent), wanted)
    xpatch.remove(base.model)


def test_loud_and_silent_make_the_whole_and_gates_say_what_is_left():
    x, some = torch.randn(40, 32), neurons(50)
    z = x @ some.keys.T + some.bias
    whole = torch.nn.functional.gelu(z) @ some.values
    plain = added(some, x, block=7)
    torch.testing.assert_close(plain.loud + plain.silent, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        plain.loud, torch.nn.functional.gelu(z).where(z >= 0, 0) @ some.values, rtol=1e-4, atol=1e-4
    )
    assert float(plain.silent.norm()) > 1
    cut = added(some, x, Gate(cut=True))
    assert torch.equal(cut.loud, plain.loud) and not cut.silent.any() and not cut.bound.any()
    lowered = added(some, x, Gate(shift=2.6))
    wanted = torch.nn.functional.gelu(z - 2.6) @ some.values
    torch.testing.assert_close(lowered.loud + lowered.silent, wanted, rtol=1e-4, atol=1e-4)
    assert not added(neurons(50, "relu"), x).silent.any()
    y = torch.ones(40, 32)
    told = leak(Rows(x, y), plain)
    assert told["median"] == pytest.approx(float((plain.silent.norm(dim=1) / 32**0.5).median()), rel=1e-3)


def test_growth_is_the_slope_of_the_logarithms():
    points = [
        {"source": "s", "gate": "g", "patches": n, "leak": {"mean": 0.01 * n**0.5, "apart": 0.1 * n}}
        for n in (10, 100, 1000, 10_000)
    ]
    assert activation.growth(points) == [{"source": "s", "gate": "g", "mean": 0.5, "apart": 1.0}]


def test_claims_are_those_the_model_gets_wrong(base, tmp_path, monkeypatch):
    monkeypatch.setattr("xpatch.benchmarks.activation_blocks.BLOCK", 8)
    store = tmp_path / "needed.txt"
    asked = many(base, 5, 10, 0, store, lambda *event: None)
    assert len(asked.requests) == 8 and set(asked.languages) == {"en", "de", "zh"}
    kept = store.read_text()
    assert many(base, 5, 10, 0, store, lambda *event: None).digest == asked.digest and store.read_text() == kept
    for case in asked.cases:
        found = xpatch.evaluation.predict(base.model, base.tokenizer, [v.text for v in case.versions.values()])
        assert any(answer != case.target for answer in found)
    edited = {version.text for case in asked.cases for version in case.versions.values()}
    assert edited.isdisjoint(
        p.text for part in (asked.locality_train, asked.locality_test) for v in part.values() for p in v
    )


def test_the_neurons_of_the_first_claims_are_the_first(base, protocol, tmp_path):
    memory = {k: [p.text for p in v] for k, v in protocol.locality_train.items()}
    settings = {"steps": 3, "activation": "relu", "keep_failed": True}
    found = trained(base, protocol.requests, 10, settings, 0, tmp_path, memory=memory, block=5)
    assert len(found.ends) == 10 and found.ends == sorted(found.ends) and found.ends[-1] == len(found.bias)
    first = found.first(5)
    alone = trained(base, protocol.requests, 5, settings, 0, None, memory=memory, block=5)
    assert torch.equal(first.keys, alone.keys) and torch.equal(first.values, alone.values)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
