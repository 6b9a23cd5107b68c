"""XME's matrices on a tiny model, and how the plain tables show them."""

from __future__ import annotations

import json

import pytest

from xpatch.benchmarks import matrix, paper, views
from xpatch.benchmarks.plan import Row
from xpatch.evaluation import Readings, predict_indices

pytestmark = pytest.mark.usefixtures("quick")
ROWS = (Row("ft", "paper", seeded=False), Row("t-patcher", "default"), Row("mend", "default", editor="nobody"))


@pytest.fixture
def result(model, tokenizer, protocol, tmp_path):
    bases = {"en": (model, tokenizer, protocol, Readings(model, tokenizer))}
    settings = {"rows": ROWS, "seeds": (0, 1), "languages": ("en", "zh"), "work": tmp_path, "progress": False}
    first = matrix.run(tmp_path / "m.json", bases, **settings)
    again = matrix.run(None, bases, **settings)
    assert [found["runs"] for found in again["matrices"]] == [found["runs"] for found in first["matrices"]]  # kept
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads(json.dumps(first))
    return first


def test_lines_are_edit_languages_and_columns_evaluation_languages(result):
    ft, patcher = result["matrices"]
    assert (ft["method"], patcher["method"]) == ("ft", "t-patcher")
    assert len(ft["runs"]) == 1 and len(patcher["runs"]) == 2 and not ft["spread"] and patcher["spread"]
    for found in (ft, patcher):
        for field in matrix.FIELDS:
            assert list(found[field]) == ["en", "zh"] and set(found[field]["zh"]) == {"en", "de", "zh"}
        assert set(found["summary"]["flips"]) == {"diagonal", "same_script", "cross_script"}
        for run in found["runs"]:
            assert all(run["n"]["ss"]["en"][y] == 4 * run["edits"]["en"] for y in ("en", "de", "zh"))
            assert all(run["n"]["flips"]["en"][y] <= run["n"]["gs"]["en"][y] for y in ("en", "de", "zh"))
    assert ft["paper"]["mBERT"]["ss"] == 99.9 and not patcher["paper"]
    (skipped,) = result["skipped"]
    assert skipped["method"] == "mend" and skipped["reason"]
    first, *rest = views.views(result)
    assert first.markdown().count("XME, mBERT") == 1 and "en: Fine-tuning" in first.markdown()
    assert len(rest) == 2 and rest[0].heads[:3] == ["edited in", "en", "de"] and len(rest[0].body) == 2
    assert "<b>" in rest[0].html() and rest[0].rich().row_count == 2


def test_an_edit_is_stated_in_one_language_alone(protocol):
    asked = matrix.stated_in(protocol.requests[0], "zh")
    assert asked.language == "zh" and set(asked.versions) == {"zh"} and asked.target == protocol.requests[0].target
    assert set(matrix.stated_in(protocol.cases[0], "zh", alone=False).versions) == {"en", "de", "zh"}


def test_cells_count_what_they_say(model, tokenizer, protocol):
    """An editor that changes nothing: no flip, everything else as the base answers, and nothing moved."""
    from xpatch.evaluation import evaluate_alone
    from xpatch.patches.types import EditRecord, PatchSet

    inert = PatchSet({}, edits=tuple(EditRecord(case.id, "mpn", "failed") for case in protocol.cases))
    report = evaluate_alone(model, tokenizer, protocol.cases, inert, locality_test=protocol.locality_test)
    cells = matrix.cells(report)
    right = [
        predict_indices(model, tokenizer, case.versions["zh"].rephrases)[0] == int(case.target == "SUPPORTS")
        for case in protocol.cases
    ]
    assert cells["gs"]["zh"] == 100 * sum(right) / 10 and cells["n"]["flips"]["zh"] == 10 - sum(right) > 0
    assert cells["flips"]["zh"] == 0 and cells["ss"]["zh"] == 100 and cells["n"]["ss"]["zh"] == 20


def test_summary_tells_scripts_apart():
    found = matrix.summary({"en": {"en": 90.0, "de": 80.0, "zh": 50.0}, "zh": {"en": 60.0, "de": None, "zh": 100.0}})
    assert found == {"diagonal": 95.0, "same_script": 80.0, "cross_script": 55.0}


def test_published_means_are_the_papers():
    assert paper.xme("mend")["mBERT"] == {"diagonal": 98.8, "same_script": 91.2, "cross_script": 63.7, "ss": 94.5}
    assert paper.xme("t-patcher") == {}
