"""What holds, from predictions: counts per edit and language, what counts as lost, the table."""

from __future__ import annotations

import io
import json

from rich.console import Console

from xpatch.evaluation.metrics import Answers
from xpatch.upgrade.report import EditReport, LanguageReport, UpgradeReport, languages_of, summed


def answers(ids, gold, before, after):
    return Answers(
        id=ids, cluster=ids, gold=gold, before=before, after=after, own=tuple(True for _ in ids)
    )  # fmt: skip


NEW = {
    "edit": {"en": answers(("a", "b"), (1, 0), (0, 0), (1, 1)), "de": answers(("a",), (1,), (0,), (0,))},
    "rephrase": {"en": answers(("a", "a", "b"), (1, 1, 0), (1, 0, 0), (0, 1, 0))},
}
# The old base's label indices are the other way round: right is what equals its own gold label.
OLD = {
    "edit": {"en": answers(("a", "b"), (0, 1), (1, 0), (0, 0)), "de": answers(("a",), (0,), (1,), (0,))},
    "rephrase": {"en": answers(("a", "a", "b"), (0, 0, 1), (1, 1, 1), (1, 0, 1))},
}


def test_lost_is_what_was_right_on_either_base_and_is_wrong_now():
    found = languages_of(NEW, OLD, {"a": None, "b": None})
    assert found["a"]["en"] == LanguageReport(
        texts=1, before=0, after=1, old=1, rephrases=2, rephrases_before=1, rephrases_after=1, rephrases_old=1, lost=1
    )
    assert found["a"]["de"] == LanguageReport(texts=1, before=0, after=0, old=1, rephrases_old=0, lost=1)
    assert found["b"]["en"] == LanguageReport(
        texts=1, before=1, after=0, old=0, rephrases=1, rephrases_before=1, rephrases_after=1, rephrases_old=1, lost=1
    )


def test_without_an_old_base_only_the_new_one_counts():
    found = languages_of(NEW, None, {"a": None, "b": None})
    assert found["a"]["en"].old is None and found["a"]["en"].rephrases_old is None
    assert found["a"]["en"].lost == 1 and found["a"]["de"].lost == 0 and found["b"]["en"].lost == 1


def made(compared):
    found = languages_of(NEW, OLD if compared else None, {"a": None, "b": None})
    edits = (
        EditReport(id="a", status="holds", method="mpn", message="", languages=found["a"]),
        EditReport(id="b", status="lost", method="mpn", message="", languages=found["b"]),
        EditReport(id="c", status="redacted", method="mpn", message="gone"),
    )
    return UpgradeReport(
        model="Bert", patches="0", retrained="1", compared=compared, edits=edits, languages=summed(edits)
    )


def test_the_summary_adds_the_edits_up():
    report = made(True)
    assert report.languages["en"].model_dump() == {
        "texts": 2, "before": 1, "after": 1, "old": 1, "rephrases": 3, "rephrases_before": 2, "rephrases_after": 2,
        "rephrases_old": 2, "lost": 2,
    }  # fmt: skip
    assert not report.holds
    assert [edit.id for edit in report.having("redacted", "holds")] == ["a", "c"]
    assert made(False).languages["en"].old is None


def test_the_table_shows_the_old_set_only_where_it_was_asked():
    for compared in (True, False):
        page = io.StringIO()
        Console(width=120, file=page).print(made(compared).table())
        text = page.getvalue()
        assert ("old set" in text) is compared
        assert "de" in text and "rephrases" in text and "lost" in text


def test_json_comes_back_as_it_was(tmp_path):
    report = made(True)
    report.to_json(tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert UpgradeReport.model_validate(json.loads((tmp_path / "report.json").read_text())) == report
