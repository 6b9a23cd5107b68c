"""The benchmark from end to end on a tiny model: rows, resuming, honesty of the counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import xpatch
from xpatch.benchmarks import crosslingual, plan
from xpatch.benchmarks.plan import Row
from xpatch.benchmarks.protocol import bundled
from xpatch.benchmarks.rows import BY_LANGUAGE, SCALARS, goals

pytestmark = pytest.mark.usefixtures("quick")


def run(model, tokenizer, protocol, out=None, **settings):
    settings = {"methods": ("original", "t-patcher", "mpn"), "seeds": (0, 1), "progress": False, **settings}
    return crosslingual.run(out, model=model, tokenizer=tokenizer, protocol=protocol, **settings)


def test_rows_hold_every_measure_and_the_papers_row(model, tokenizer, protocol, tmp_path):
    before = crosslingual.cache.digest(model)
    result = run(model, tokenizer, protocol, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(result))
    rows = {(row["method"], row["preset"]): row for row in result["methods"]}
    assert ("original", None) in rows and ("mpn", "paper") in rows and ("mpn", "default") in rows
    for row in rows.values():
        for field in ("name", "patches", "edits", "edits_per_s", "paper", *SCALARS, *BY_LANGUAGE):
            assert field in row
        assert set(row["clg"]) == {"de", "zh"} and set(row["clg_unseen_any"]) == {"en", "de", "zh"}
        assert row["restored_bit_exact"] and row["edit_set"] == 10
        low, high = row["intervals"]["reliability"]
        assert low <= row["reliability"] <= high
    assert len(rows["mpn", "default"]["runs"]) == 2 and len(rows["original", None]["runs"]) == 1
    assert rows["original", None]["patches"] == 0 and rows["original", None]["unchanged_avg"] == 100
    assert rows["mpn", "paper"]["paper"]["clg_avg"] == 97.25
    assert crosslingual.cache.digest(model) == before
    assert {"machine", "versions", "seeds", "command", "date"} <= set(result["header"])
    assert result["header"]["machine"]["cores"] and "git" not in json.dumps(result["header"]).replace("digit", "")


def test_each_method_decides_by_its_own_rule(model, tokenizer, protocol):
    result = run(model, tokenizer, protocol, presets=("paper",), seeds=(0,))
    counts = {row["method"]: row["edits"] for row in result["methods"]}
    wrong = {row["method"]: row["before"] for row in result["methods"]}["original"]
    assert counts["t-patcher"] >= round(10 * (1 - wrong["en"] / 100))  # wrong in English, or made wrong by other edits
    assert counts["mpn"] >= round(10 * (1 - min(wrong.values()) / 100))  # wrong in any language
    assert counts["mpn"] >= counts["t-patcher"]


def test_finished_runs_are_reused_until_something_changes(model, tokenizer, protocol, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    first = run(model, tokenizer, protocol, out, methods=("original", "mpn"), presets=("default",))
    kept = sorted((tmp_path / "r.work").glob("*.json.gz"))
    assert len(kept) == 3 and (tmp_path / "r.work" / ".gitignore").read_text() == "*\n"
    kept[1].unlink()
    asked = []
    measure = crosslingual.measure_row
    tell = lambda *a, **k: asked.append((a[3].method, a[3].preset, a[4])) or measure(*a, **k)  # noqa: E731
    monkeypatch.setattr(crosslingual, "measure_row", tell)
    again = run(model, tokenizer, protocol, out, methods=("original", "mpn"), presets=("default",))
    assert asked == [("mpn", "default", 1)]
    for row in (*first["methods"], *again["methods"]):
        for part in (row, row["spread"], *row["runs"]):
            for timing in ("seconds", "edits_per_s", "cpu_s"):
                part.pop(timing, None)
    assert first["methods"] == again["methods"]
    asked.clear()
    run(model, tokenizer, protocol, out, methods=("original",), seeds=(0,), steps=4)  # another setting, another run
    assert asked == [("original", None, 0)]


def test_examples_name_the_answers(model, tokenizer, protocol):
    result = run(model, tokenizer, protocol, methods=("original", "mpn"), presets=("default",), seeds=(0,))
    assert 1 <= len(result["examples"]) <= 3
    for example in result["examples"]:
        assert set(example["languages"]) == {"en", "de", "zh"}
        assert all(found["before"] in ("REFUTES", "SUPPORTS") for found in example["languages"].values())


def test_a_row_that_cannot_be_run_is_skipped_with_its_reason(model, tokenizer, protocol, tmp_path):
    rows = (
        Row("original", seeded=False),
        Row("no-such-method", "default"),
        Row("mpn", "no-such-preset"),
        Row("mpn", "default", "a setting it has not", {"no_such_setting": 1}),
        Row("t-patcher", "default", editor="nobody"),
        Row("t-patcher", "default"),
    )
    result = run(model, tokenizer, protocol, rows=rows, methods=None, seeds=(0,), part="zero-shot", editors=tmp_path)
    assert [row["method"] for row in result["methods"]] == ["original", "t-patcher"]
    reasons = [found["reason"] for found in result["skipped"]]
    wanted = ("no such method", "no-such-preset", "no_such_setting", "no trained editor at")
    assert len(reasons) == 4 and all(want in reason for want, reason in zip(wanted, reasons, strict=True))


def test_rows_differ_in_settings_and_languages(model, tokenizer, protocol, tmp_path):
    rows = (
        Row("mpn", "default", "en + de", languages=("en", "de")),
        Row("mpn", "default", "more neurons", {"neurons": 5, "max_neurons": 5}),
        Row("mpn", "default"),
    )
    result = run(model, tokenizer, protocol, tmp_path / "r.json", rows=rows, methods=None, seeds=(0,), part="zero-shot")
    fewer, more, plain = result["methods"]
    assert fewer["languages"] == ["en", "de"] and fewer["label"] == "en + de" and plain["languages"] is None
    assert more["patches"] % 5 == 0 and more["patches"] >= 5 * more["edits"] - 5 * more["failed"] > 0
    assert fewer["edits"] <= plain["edits"]
    assert len(list((tmp_path / "r.work").glob("*.json.gz"))) == 3


def test_rows_are_also_measured_one_edit_at_a_time(model, tokenizer, protocol):
    rows = (Row("t-patcher", "default", alone=True),)
    result = run(model, tokenizer, protocol, rows=rows, methods=None, seeds=(0, 1), part="zero-shot", steps=60)
    (row,) = result["methods"]
    assert row["alone"]["edit_set"] <= 10 and set(row["alone"]["clg_unseen"]) == {"en", "de", "zh"}
    assert row["alone"]["clg_needed"]["en"] >= row["clg_needed"]["en"] - 1e-6  # nothing else disturbs it
    assert len(row["alone"]["runs"]) == 2


def test_the_plan_is_data():
    for rows in (plan.TABLE, plan.ALL_WRONG, plan.ZERO_SHOT, plan.MATRIX):
        assert len({row.key for row in rows}) == len(rows)
    known = {row.method for row in plan.TABLE}
    assert set(xpatch.methods()) <= known | {row.method for row in plan.chosen(plan.TABLE, None, None, others=True)}
    assert [row.key for row in plan.chosen(plan.TABLE, ["mpn"], ["paper"])] == ["mpn-paper"]
    left = [row for row in plan.ZERO_SHOT if row.method == "mpn" and row.label.startswith("without")]
    assert {row.label[-2:] for row in left} == {"de", "zh", "ar"}
    assert all(row.label[-2:] not in row.languages and len(row.languages) == 5 for row in left)


def test_an_editor_counts_by_its_files(model, protocol, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "editor.json").write_text("{}")
    key = lambda name: crosslingual.cache.key(model, protocol, {"editor": str(tmp_path / name)}, "mpn")  # noqa: E731
    assert key("a") == key("b")
    (tmp_path / "b" / "editor.json").write_text("{ }")
    assert key("a") != key("b")


def test_a_methods_key_holds_the_code_it_uses():
    folders = crosslingual.cache._folders(Path(xpatch.__file__).parent / "editors", "mpn")
    assert {"mpn", "t_patcher"} <= folders and "ft" not in folders
    assert "ft" in crosslingual.cache._folders(Path(xpatch.__file__).parent / "editors", None)


def test_unknown_method(model, tokenizer, protocol):
    with pytest.raises(xpatch.FormatError, match="rome"):
        run(model, tokenizer, protocol, methods=("rome",))


def test_goals_compare_with_the_default_preset():
    row = {
        "method": "mpn", "preset": "default", "clg_needed": {"en": 99.0}, "clg_unseen": {"en": 96.0, "zh": 79.0},
        "unchanged": {"en": 98.0}, "unchanged_avg": 98.5, "clg_avg": 95.0,
    }  # fmt: skip
    found = {
        goal["what"]: goal["met"] for goal in goals([row, {"method": "t-patcher", "preset": "paper", "clg_avg": 85.0}])
    }
    assert not found.pop("unseen paraphrases right, zh") and all(found.values()) and len(found) == 5
    assert goals([]) == []


def test_the_bundled_protocol_is_big_enough_and_keeps_subjects_apart():
    asked = bundled()
    subjects = [case.versions["en"].subject for case in asked.cases]
    assert len(asked.cases) >= 300 and [r.id for r in asked.requests] == [c.id for c in asked.cases]
    assert all(len(probes) >= 2000 for probes in asked.locality_test.values())
    assert all(len(probes) >= 2000 for probes in asked.locality_train.values())
    trained = {p.text for r in asked.requests for v in r.versions.values() for p in (v.probe, *v.rephrases)}
    unseen = {p.text for c in asked.cases for v in c.versions.values() for p in v.rephrases}
    assert not trained & unseen
    kept = {p.text for part in (asked.locality_train, asked.locality_test) for probes in part.values() for p in probes}
    assert not kept & (trained | unseen)
    edited = {case.id.rsplit("-", 1)[0].split("-", 1)[1] for case in asked.cases}
    assert len(edited) == len(subjects) and not edited & {*asked.groups["train"], *asked.groups["test"]}
    few = bundled(edits=20, locality=50)
    assert len(few.cases) == 20 and {len(probes) for probes in few.locality_test.values()} == {50}
    assert few.digest == bundled(edits=20, locality=50).digest != asked.digest
