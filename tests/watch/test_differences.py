"""Which predictions a set changes, against what applying it does."""

from __future__ import annotations

import csv
import io
import json

import pytest

import xpatch
from xpatch import FormatError, MismatchError
from xpatch.evaluation import predict
from xpatch.watch import diff


@pytest.fixture
def texts(claims):
    return [{"text": text, "language": language} for versions in claims.values() for language, text in versions.items()]


def test_changes_are_what_apply_changes(verifier, turn, texts):
    model, tokenizer = verifier
    patches = turn(["ipod", "rome"], "REFUTES", name="fixes")
    plain = [text["text"] for text in texts]
    before = predict(model, tokenizer, plain)
    found = diff(model, tokenizer, patches, texts=texts)
    assert xpatch.status(model).names == ()
    xpatch.apply(model, patches)
    after = predict(model, tokenizer, plain)
    assert [row.before for row in found.rows] == before and [row.after for row in found.rows] == after
    assert [row.text for row in found.rows] == plain and before != after
    assert len(found) == sum(one != two for one, two in zip(before, after, strict=True)) == len(found.changes)
    assert {row.fired_after for row in found.changes} == {("fixes/ipod",), ("fixes/rome",)}
    assert all(row.fired_before == () and 0.5 < row.probability_after <= 1 for row in found.rows)
    assert found.by_language == {"en": (2, 4), "de": (2, 4)}


def test_one_set_in_the_place_of_another(verifier, turn, texts):
    model, tokenizer = verifier
    first, second = turn(["ipod"], "REFUTES", name="fixes"), turn(["rome"], "REFUTES", name="newer")
    found = diff(model, tokenizer, first, second, texts=texts)
    changed = {row.text: (row.before, row.after, row.fired_before, row.fired_after) for row in found.changes}
    assert changed["IPod Touch was developed by Apple Inc."] == ("REFUTES", "SUPPORTS", ("fixes/ipod",), ())
    assert changed["Rome is the capital of Italy."] == ("SUPPORTS", "REFUTES", (), ("fixes/rome",))
    assert len(changed) == 4


def test_before_is_what_the_model_serves_now(verifier, turn, texts):
    """A set of the same name is replaced, sets of other names stay; the model serves on."""
    model, tokenizer = verifier
    xpatch.apply(model, turn(["ipod"], "REFUTES"), name="fixes")
    xpatch.apply(model, turn(["paris"], "REFUTES"), name="others")
    better = turn(["ipod", "rome"], "REFUTES")
    found = diff(model, tokenizer, better, texts=texts, name="fixes")
    assert {row.text for row in found.changes} == {
        "Rome is the capital of Italy.",
        "Rom ist die Hauptstadt von Italien.",
    }
    paris = next(row for row in found.rows if row.text.startswith("Paris is"))
    assert paris.before == paris.after == "REFUTES" and paris.fired_after == ("others/paris",)
    beside = diff(model, tokenizer, better, texts=texts, name="beside")
    ipod = next(row for row in beside.rows if row.text.startswith("IPod Touch was"))
    assert set(ipod.fired_after) == {"fixes/ipod", "beside/ipod"}
    assert xpatch.status(model).names == ("fixes", "others")


def test_folders_files_and_progress(verifier, turn, texts, tmp_path):
    model, tokenizer = verifier
    xpatch.save(turn(["ipod"], "REFUTES"), tmp_path / "fixes")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    heard = []
    found = diff(
        model, tokenizer, tmp_path / "fixes", texts=path, batch_size=3, progress=lambda *words: heard.append(words)
    )
    assert len(found) == 2 and found.changes[0].fired_after == ("fixes/ipod",)
    assert heard == [(stage, done, 8) for stage in ("before", "after") for done in (3, 6, 8)]


def test_data_csv_and_table(verifier, turn, texts, tmp_path):
    model, tokenizer = verifier
    found = diff(model, tokenizer, turn(["ipod"], "REFUTES", name="fixes"), texts=[*texts, "No language, no change."])
    data = json.loads(json.dumps(found.to_dict()))
    assert (data["texts"], data["changed"], len(data["rows"])) == (9, 2, 2)
    assert data["by_language"]["?"] == {"changed": 0, "texts": 1}
    assert len(found.to_dict(all=True)["rows"]) == 9
    out = tmp_path / "changes.csv"
    rows = list(csv.DictReader(io.StringIO(found.to_csv(out))))
    assert [(row["before"], row["after"], row["fired_after"]) for row in rows] == [
        ("SUPPORTS", "REFUTES", "fixes/ipod")
    ] * 2
    assert out.read_text(encoding="utf-8") == found.to_csv() and [p.name for p in tmp_path.iterdir()] == ["changes.csv"]
    assert len(list(csv.DictReader(io.StringIO(found.to_csv(all=True))))) == 9
    assert str(found).startswith("2 of 9 predictions change\ntext") and "fixes/ipod" in str(found)


def test_bad_arguments(verifier, turn, tiny, word_tokenizer, tmp_path):
    model, tokenizer = verifier
    patches = turn(["ipod"], "REFUTES")
    with pytest.raises(FormatError, match="at least one"):
        diff(model, tokenizer, patches, texts=[])
    with pytest.raises(FormatError, match="PatchSet"):
        diff(model, tokenizer, {"parts": {}}, texts=["a"])
    with pytest.raises(MismatchError):  # another base: there is no such site
        diff(tiny("bert"), word_tokenizer, patches, texts=["w5"])


def test_language_models(tiny, word_tokenizer, owned):
    model = tiny("bert-mlm")
    found = diff(model, word_tokenizer, owned(model), texts=["w5 [MASK] w7", "w5 w6 w7 [MASK]"])
    assert len(found.rows) == 2 and all(row.before.startswith(("w", "[")) for row in found.rows)
    assert any(row.fired_after for row in found.rows)


def test_expired_edits_are_left_out(verifier, turn, texts):
    model, tokenizer = verifier
    assert len(diff(model, tokenizer, turn(["ipod"], "REFUTES", expires="2001-01-01"), texts=texts)) == 0
    assert len(diff(model, tokenizer, turn(["ipod"], "REFUTES", expires="9999-01-01"), texts=texts)) == 2
