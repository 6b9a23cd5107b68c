"""One bad request among many: named in the ledger, without a part in anything; the others as if it had not been there."""

from __future__ import annotations

from typing import Any

import pytest

import xpatch
from tests.editors.conftest import QUICK, make_requests, memory, model_of, tokenizer_of
from xpatch.editors import edit
from xpatch.errors import FormatError
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import PatchSet

GOOD = {
    "id": "good",
    "text": "name1 was born in city1",
    "target": "0",
    "parallel": {"de": "name1 wurde in city1 geboren"},
}


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Any]:
    return model_of("bert"), tokenizer_of("bert")


def train(bert: Any, *requests: Any, method: str = "mpn", **options: Any) -> PatchSet:
    settings = {"memory": memory(), "progress": False, **QUICK[method], "steps": 3, "rescue": False, **options}
    if method == "ft":
        settings.pop("rescue")
    return edit(*bert, list(requests), method, **settings)


def rejected(patches: PatchSet) -> dict[str, str]:
    assert all(not (record.rows or record.group) for record in patches if record.status == "rejected")
    return {record.id: record.message or "" for record in patches if record.status == "rejected"}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"target": "MAYBE"}, ("'bad', language 'en'", "'MAYBE'", "REFUTES, SUPPORTS, UNKNOWN")),
        ({"target": "3"}, ("'3'", "SUPPORTS")),
        ({"target": None}, ("'bad'", "no target", "SUPPORTS")),
        ({"parallel": {"de": {"text": "name2", "target": "JA"}}}, ("language 'de'", "'JA'")),
        ({"rephrases": [{"text": "name2", "target": "NO"}]}, ("language 'en'", "'NO'")),
        ({"text": "  \t"}, ("language 'en'", "only white space", "give the text")),
        ({"rephrases": [{"text": "Name2!", "target": "0"}]}, ("contradicts itself", "'0'", "'1'", "name2")),
    ],
)  # fmt: skip
def test_a_bad_request_is_named_and_the_others_are_edited_as_without_it(
    bert: Any, bad: dict[str, Any], words: tuple[str, ...]
) -> None:
    alone = train(bert, GOOD)
    together = train(bert, {"id": "bad", "text": "name2", "target": "1", **bad}, GOOD)
    assert [record.id for record in together] == ["bad", "good"]
    found = rejected(together)
    assert list(found) == ["bad"] and all(word in found["bad"] for word in words), found
    assert together.edits[1].status == alone.edits[0].status != "rejected"
    assert {k: v.tolist() for k, v in together.tensors.items()} == {k: v.tolist() for k, v in alone.tensors.items()}
    record = together.edits[0]
    assert (record.method, record.seed, record.hyperparameters["preset"]) == ("mpn", 0, "default") and record.created


@pytest.mark.parametrize("method", ["mpn", "mpn-only", "t-patcher", "ft"])
def test_only_bad_requests_give_a_set_without_parts(bert: Any, method: str, tmp_path: Any) -> None:
    patches = train(
        bert, {"id": "a", "text": "name1", "target": "MAYBE"}, {"id": "b", "text": " ", "target": "0"}, method=method
    )
    assert not patches.parts and set(rejected(patches)) == {"a", "b"} and patches.base is not None
    xpatch.save(patches, tmp_path / "none")
    again = xpatch.load(tmp_path / "none")
    assert again.fingerprint == patches.fingerprint and rejected(again) == rejected(patches)


def test_contradictory_requests_name_each_other(bert: Any) -> None:
    one = {"id": "one", "text": "name3 was born in city3.", "target": "REFUTES"}
    two = {"id": "two", "text": "Name3 was born in  city3", "target": "1"}
    found = rejected(train(bert, one, GOOD, two))
    assert list(found) == ["one", "two"]
    assert (
        "contradicts 'two', which asks for '1'" in found["one"] and "name3" in found["one"] and "(en)" in found["one"]
    )
    assert "contradicts 'one', which asks for 'REFUTES'" in found["two"]
    assert rejected(train(bert, one, {**two, "target": "0"})) == {}  # one label by name and by index, in other words
    assert rejected(train(bert, one, {**two, "language": "de"})) == {}
    assert rejected(train(bert, one, {**two, "text_pair": "and more"})) == {}


def test_a_contradiction_counts_in_the_languages_that_take_part(bert: Any) -> None:
    other = {"id": "other", "text": "name9", "target": "1", "parallel": GOOD["parallel"]}
    assert set(rejected(train(bert, GOOD, other))) == {"good", "other"}
    assert rejected(train(bert, GOOD, other, languages=["en"])) == {}


def test_a_repetition_is_rejected_and_says_of_what(bert: Any) -> None:
    again = {**GOOD, "id": "again", "target": "REFUTES"}
    third = {**GOOD, "id": "third"}
    patches = train(bert, GOOD, again, third)
    assert rejected(patches) == dict.fromkeys(
        ("again", "third"), "duplicate of 'good': the same texts with the same target"
    )
    assert rejected(train(bert, GOOD, {**again, "parallel": {}})) == {}
    assert rejected(train(bert, GOOD, {**again, "rephrases": ["name1 came from city1"]})) == {}
    both = rejected(train(bert, GOOD, again, {**GOOD, "id": "against", "target": "1"}))
    assert set(both) == {"good", "again", "against"} and "'good'" in both["against"] and "'again'" in both["against"]


@pytest.mark.parametrize(("method", "told"), [("mpn", True), ("mpn-only", True), ("t-patcher", False)])
def test_languages_without_a_text_are_named_not_rejected(bert: Any, method: str, told: bool) -> None:
    bare = {"id": "bare", "text": "name5 was born in city5", "target": "0"}
    blank = {**GOOD, "id": "blank", "text": "name6 was born in city6", "parallel": {"de": " "}}
    patches = train(bert, GOOD, bare, blank, method=method, languages=["en", "de"])
    assert rejected(patches) == {}
    said = [(record.message or "").endswith("; no text in de") for record in patches]
    assert said == [False, told, told]


def test_what_is_wrong_with_the_call_still_raises(bert: Any) -> None:
    with pytest.raises(FormatError, match="'good' occurs twice"):
        train(bert, GOOD, GOOD)
    with pytest.raises(FormatError, match="no setting"):
        train(bert, {**GOOD, "target": "MAYBE"}, nothing=1)
    with pytest.raises(FormatError, match="memory"):
        train(bert, {**GOOD, "target": "MAYBE"}, memory="no-such-file.jsonl")


def test_a_rejected_text_is_no_memory_of_the_others(bert: Any) -> None:
    """Locality probes of a rejected request do not reach the training either."""
    requests = make_requests(*bert, 2)
    bad = EditRequest(id="bad", versions={"en": {"text": "name7", "locality": ["name8", "name9"]}}, target="MAYBE")
    alone, together = train(bert, *requests), train(bert, bad, *requests)
    assert {k: v.tolist() for k, v in together.tensors.items()} == {k: v.tolist() for k, v in alone.tensors.items()}
