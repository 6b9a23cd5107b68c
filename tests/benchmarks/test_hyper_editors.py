"""The recipe of the verifier's editors: what they may see, that a finished one is used again, and what is measured."""

from __future__ import annotations

import json

import pytest
import torch

import xpatch
from xpatch import zoo
from xpatch.benchmarks import hyper_editors, hyper_measure, result_blocks
from xpatch.zoo.verifier import data

SMALL = {"steps": 1, "edits_per_step": 2, "validation_edits": 2, "rank": 8, "validate_every": 1}


def test_editors_see_classification_facts_alone():
    train, held = hyper_editors.training_requests()
    allowed = {fact.key: fact for fact in data.facts("train")}
    subjects = []
    for requests in (train, held):
        keys = {request.id.rsplit("-", 1 + request.id.count("editor"))[0] for request in requests}
        assert keys <= allowed.keys()
        subjects.append({allowed[key].subject for key in keys})
    assert not subjects[0] & subjects[1] and len(train) > 5 * len(held) > 0
    seen = {p.text for r in (*train, *held) for v in r.versions.values() for p in (v.probe, *v.rephrases)}
    for split in ("edit", "validation", "test"):
        facts = {
            (text) for item in data.one_claim_per_subject(split) for texts in item.texts.values() for text in texts
        }
        assert not seen & facts
    unseen = {
        text for item in data.claims("train") for texts in item.texts.values() for text in texts[2:]
    }  # the wordings locality is measured in
    assert len(seen & unseen) < 0.02 * len(seen)  # two templates may agree in a language


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("editors")
    found = hyper_editors.run(
        place / "result.json", editors=("mend:en-en",), edits=3, work=place / "work", progress=False, **SMALL
    )
    return place, found


def test_what_is_measured(result):
    place, found = result
    assert json.loads((place / "result.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    row = found["rows"][0]
    assert row["editor"] == "mend:en-en" and row["steps"] == 1
    alone = row["alone"]
    assert alone["edits"] == 3 and set(alone["clg"]) == set(data.LANGUAGES) and alone["success"] == alone["clg"]["en"]
    assert alone["before"]["en"] == 0  # a flip asks for what the model does not say
    assert all(
        0 <= alone[kind][language] <= 100 for kind in ("clg", "unseen", "unchanged") for language in data.LANGUAGES
    )
    both = row["together"]
    assert set(both) == {"flips", "corrections"} and sum(both["flips"]["statuses"].values()) == 3


def test_the_readme_shows_what_was_measured(result):
    text = result_blocks.trained_editors(result[1])
    assert "| mend, en-en | " in text and "3 flipped claims" in text
    assert f"{result[1]['rows'][0]['alone']['unchanged_avg']:.1f}" in text


def test_the_work_folder_is_ignored_and_its_editors_are_used_again(result):
    place, _ = result
    assert (place / "work" / ".gitignore").read_text(encoding="utf-8") == "*\n"
    before = {path: path.read_bytes() for path in (place / "work").rglob("*.safetensors")}
    model, tokenizer = zoo.load("verifier")
    again = hyper_editors.train("mend:en-en", model, tokenizer, work=place / "work", progress=False, **SMALL)
    assert again.steps == 1 and before == {path: path.read_bytes() for path in before}
    patches = xpatch.edit(
        model, tokenizer, hyper_measure.flips(model, tokenizer, 1), method="mend", preset="paper",
        editor=hyper_editors.editor("mend", place / "work"), progress=False,
    )  # fmt: skip
    assert len(patches.parts) == 6


def test_editors_of_another_base_lie_apart(tmp_path, monkeypatch):
    model, tokenizer = zoo.load("verifier")
    other = tmp_path / "bases" / "zh"
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    trained = []
    monkeypatch.setattr(
        hyper_editors, "train", lambda name, model, tokenizer, **how: trained.append((name, how["work"]))
    )
    monkeypatch.setattr(
        "sys.argv", ["x", "--base", str(other), "--editors", "ke:en-en", "--work", str(tmp_path / "work")]
    )
    hyper_editors.main()
    assert trained == [("ke:en-en", tmp_path / "work" / "zh")]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(xpatch.FormatError, match="no editor 'ke:xx'; expected METHOD:MODE .* en-all"):
        hyper_editors.run(editors=["mend:en-en", "ke:xx"], work=tmp_path, progress=False)
    with pytest.raises(xpatch.FormatError, match="no base at .*zh: expected a folder with config.json; make it with"):
        hyper_editors.run(editors=["ke:en-en"], base=tmp_path / "zh", work=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_limit_of_what_is_not_measured_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--edits", "3"])
    with pytest.raises(SystemExit):
        hyper_editors.main()
    assert "give --json as well" in capsys.readouterr().err
