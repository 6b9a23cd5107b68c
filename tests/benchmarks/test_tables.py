"""The command that makes all tables: its parts, files and claims; and the plain tables the README and the page show."""

from __future__ import annotations

import json

import pytest

import xpatch
from xpatch import FormatError
from xpatch.benchmarks import bases, claims, crosslingual, paper, plan, readme, report, tables, views
from xpatch.benchmarks.plan import Row
from xpatch.evaluation import predict_indices
from xpatch.zoo.verifier import data

HURRY = {"steps": 2, "memory_rows": 50}


@pytest.fixture
def zero_shot(model, tokenizer, protocol, quick):
    rows = (Row("original", seeded=False), Row("mpn", "default", "en", languages=("en",)), Row("mpn", "default", "all"))
    return crosslingual.run(
        None, part="zero-shot", rows=rows, model=model, tokenizer=tokenizer, protocol=protocol, seeds=(0,), progress=False
    )  # fmt: skip


def test_left_out_languages_stand_apart(zero_shot):
    view = views.zero_shot_table(zero_shot["methods"])
    lines = {row[0].text: row for row in view.body}
    styles = [cell.style for cell in lines["MPN (all), default, en"]]
    assert styles == ["", "", "strong", "strong", "strong"]  # name, en, de, zh, mean of the left out
    assert [cell.style for cell in lines["MPN (all), default, all"][1:-1]] == ["", "", ""]
    assert lines["MPN (all), default, all"][-1].text == ""


def test_locality_is_shown_in_every_language(zero_shot):
    view = views.locality_table(zero_shot["methods"])
    assert view.heads == ["method", "", "en", "de", "zh"] and len(view.body) == 6
    signed = [cell.text for row in view.body if row[1].text.startswith("accuracy") for cell in row[2:]]
    assert all(text[0] in "+-" for text in signed)


def test_the_table_of_single_edits(model, tokenizer, protocol, quick):
    rows = (Row("t-patcher", "default", alone=True),)
    result = crosslingual.run(
        None, part="all-wrong", rows=rows, model=model, tokenizer=tokenizer, protocol=protocol, seeds=(0,), progress=False
    )  # fmt: skip
    view = views.alone_table(result["methods"])
    assert [row[1].text for row in view.body] == ["together", "alone"] and view in views.views(result)
    assert views.alone_table([{"method": "mpn"}]) is None
    assert result["methods"][0]["paper"]["patches"] == 710


def test_table_3_is_the_papers():
    for method in ("ft", "t-patcher", "mpn"):
        found = paper.row(method, "all-wrong")
        assert (
            sum(found["clg"].values()) / 5 == pytest.approx(found["clg_avg"], abs=0.01) and "Table 3" in found["source"]
        )
    assert paper.row("mpn-only", "all-wrong") is None and paper.row("mpn", "zero-shot") is None


def test_readme_and_page_show_every_part(zero_shot, tmp_path):
    out = tmp_path / "crosslingual.json"
    out.write_text(json.dumps({**zero_shot, "part": "table"}))
    tables.path_of(out, "zero-shot").write_text(json.dumps(zero_shot))
    assert (tmp_path / "crosslingual_zero_shot.json").is_file()
    text = readme.page(tmp_path)
    assert "## Languages left out of training" in text and "What the" not in text
    assert "Languages left out" not in readme.block(tmp_path)
    page = report.page(json.loads(out.read_text()), None, [zero_shot])
    assert page.count("Languages left out of training") == 1 and "Locality in every language" in page
    assert len(report.tables(zero_shot)) == 1


def test_every_object_makes_a_claim():
    made = data.every_claim("validation")
    fact = data.facts("validation")[0]
    mine = [claim for claim in made if claim.fact == fact]
    assert sum(claim.label == "SUPPORTS" for claim in mine) == 1 and len({claim.id for claim in made}) == len(made)
    objects = {other.object for other in data.facts() if other.relation == fact.relation}
    assert 1 < len(mine) <= len(objects)
    single = next(claim for claim in mine if claim.label == "SUPPORTS")
    assert single.texts == data.claim(fact, True).texts


def test_claims_wrong_everywhere(tmp_path):
    """On the bundled verifier, over part of the candidates: what is chosen is wrong in every language, one a subject."""
    from xpatch import zoo

    model, tokenizer = zoo.load("verifier")
    some = [claim for claim in data.every_claim("edit") if claim.fact.relation == "P30"][:300]
    wrong = claims.find(model, tokenizer, some)
    assert 0 < len(wrong) < len(some) / 2
    for language in data.LANGUAGES:
        answers = predict_indices(model, tokenizer, [claim.texts[language][0] for claim in wrong])
        assert all(data.LABELS[answer] != claim.label for answer, claim in zip(answers, wrong, strict=True))
    chosen = claims.one_per_subject(wrong)
    assert len(chosen) == len({claim.fact.subject for claim in wrong}) and chosen == claims.one_per_subject(wrong[::-1])


def test_claims_are_found_once_a_model(model, tokenizer, monkeypatch, tmp_path):
    every = data.every_claim("edit")[:400]
    monkeypatch.setattr(claims.data, "every_claim", lambda split: every)
    monkeypatch.setattr(claims, "find", lambda m, t, candidates, languages: list(candidates))
    first = claims.wrong_everywhere(model, tokenizer, folder=tmp_path, locality=5)
    monkeypatch.setattr(claims, "find", lambda *a: pytest.fail("asked again"))
    again = claims.wrong_everywhere(model, tokenizer, folder=tmp_path, locality=5)
    assert first.digest == again.digest and first.describe()["rules"][0].startswith("The edit set is one claim")
    assert "wrong in every" in " ".join(again.edit_rules)
    few = claims.wrong_everywhere(model, tokenizer, 3, 5, folder=tmp_path)
    assert len(few.cases) == 3 and {len(probes) for probes in few.locality_test.values()} == {5}


def test_unknown_part(tmp_path):
    with pytest.raises(xpatch.FormatError, match="no part tabel"):
        tables.run(tmp_path / "r.json", parts=["tabel"])


@pytest.mark.slow
def test_everything_at_once(tmp_path, monkeypatch):
    """All parts on the bundled verifier in smallest sizes, one further base; what is finished is not made again."""
    some = [claim for claim in data.every_claim("edit") if claim.fact.relation in ("P30", "P106", "P140")]
    monkeypatch.setattr(claims.data, "every_claim", lambda split: some)
    monkeypatch.setattr(bases, "LANGUAGES", {"zh": ("zh",)})
    make = bases.make
    monkeypatch.setattr(bases, "make", lambda folder, name, **k: make(folder, name, **{**k, "steps": 3}))
    monkeypatch.setattr(
        plan, "TABLE", (Row("original", seeded=False), Row("mpn", "default"), Row("mend", "default", editor="mend"))
    )
    monkeypatch.setattr(plan, "ALL_WRONG", plan.TABLE)
    monkeypatch.setattr(plan, "ZERO_SHOT", (Row("mpn", "default", "en + de", languages=("en", "de")),))
    monkeypatch.setattr(plan, "MATRIX", (Row("t-patcher", "default"),))
    told = []
    settings = {
        "quick": True,
        "edits": 4,
        "locality": 10,
        "matrix_edits": 2,
        "progress": False,
        "methods": ["original", "mpn", "mend", "t-patcher"],
    }
    found = tables.run(tmp_path / "r.json", tell=told.append, **settings, **HURRY)
    assert set(found) == set(tables.PARTS)
    for part in tables.PARTS:
        assert json.loads(tables.path_of(tmp_path / "r.json", part).read_text())["part"] == part
    assert {m["base"] for m in found["matrix"]["matrices"]} == {"en", "zh"}
    row = next(row for row in found["all-wrong"]["methods"] if row["method"] == "original")
    assert row["reliability"] == row["clg_avg"] == 0

    def only_what_was_skipped(model, tokenizer, asked, row, *rest, **more):
        assert row.method == "mend", f"{row} is measured again"
        raise FormatError("no editor")

    monkeypatch.setattr(crosslingual, "measure_row", only_what_was_skipped)
    again = tables.run(tmp_path / "r.json", **settings, **HURRY)
    assert [r["runs"] for r in again["table"]["methods"]] == [r["runs"] for r in found["table"]["methods"]]
