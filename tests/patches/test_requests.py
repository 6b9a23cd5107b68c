"""Edit requests: the two forms, their JSONL, and messages that name line, number and content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from xpatch.errors import FormatError
from xpatch.patches.requests import EditRequest, Probe, Version, as_requests, read_requests, write_requests

GOOD = {"id": "a", "text": "Claim", "target": "REFUTES"}


def test_flat_form_is_the_full_form() -> None:
    flat = EditRequest.model_validate(
        {
            "id": 7,
            "text": "Claim",
            "text_pair": "Second",
            "subject": "S",
            "target": 1,
            "language": "de",
            "parallel": {"en": "C", "fr": {"text": "F", "target": 0}},
            "rephrases": ["R1", {"text": "R2", "text_pair": "P", "target": 2}],
            "locality": ["L"],
            "portability": [],
            "author": "me",
        }
    )
    probes = (Probe(text="R1"), Probe(text="R2", text_pair="P", target="2"))
    german = Version(text="Claim", text_pair="Second", subject="S", rephrases=probes, locality=(Probe(text="L"),))
    assert flat == EditRequest(
        id="7",
        language="de",
        target="1",
        author="me",
        versions={"de": german, "en": Version(text="C"), "fr": Version(text="F", target="0")},
    )
    assert (flat.target_of("en"), flat.target_of("fr")) == ("1", "0")
    assert german.probe == Probe(text="Claim", text_pair="Second")


def test_versions_may_be_plain_texts() -> None:
    request = EditRequest(id="a", versions={"en": "Claim", "zh": {"text": "句"}})
    assert request.versions["en"] == Version(text="Claim") and request.target_of("en") is None
    assert EditRequest(id="a", text="x", parallel=None).versions == {"en": Version(text="x")}
    with pytest.raises(ValidationError):
        request.id = "b"


@pytest.mark.parametrize(("given_target", "read"), [("REFUTES", "REFUTES"), (0, "0"), (12, "12"), (None, None)])
def test_label_types(given_target: object, read: str | None) -> None:
    request = as_requests({**GOOD, "target": given_target, "old_target": given_target})[0]
    assert request.target == request.old_target == read


def test_everything_iterable_is_taken() -> None:
    request = EditRequest(**GOOD)
    assert as_requests(request) == as_requests(GOOD) == as_requests([GOOD]) == as_requests(iter([request])) == [request]
    assert [each.id for each in as_requests([request, {**GOOD, "id": "b"}])] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"text": "Claim"}, r"id: Field required; found .*Claim"),
        ({"id": "a"}, "versions: Field required"),
        ({"id": "", "text": "x"}, "id: String should have at least 1 character"),
        ({"id": True, "text": "x"}, "id: Input should be a valid string"),
        ({"id": "a", "text": ""}, r"versions.en.text: String should have at least 1 character"),
        ({"id": "a", "text": 3}, "versions.en.text: Input should be a valid string"),
        ({**GOOD, "target": True}, "target: Input should be a valid string"),
        ({**GOOD, "target": 1.5}, "target: Input should be a valid string"),
        ({**GOOD, "target": ["REFUTES"]}, "target: Input should be a valid string"),
        ({**GOOD, "taget": "x"}, "taget: Extra inputs are not permitted"),
        ({**GOOD, "versions": {"en": "x"}}, "give either 'text' .flat form. or 'versions', not both"),
        ({**GOOD, "parallel": {"en": "x"}}, "'parallel' repeats the edit's own language 'en'"),
        ({**GOOD, "parallel": ["x"]}, "'parallel' must map a language code to a text"),
        ({**GOOD, "parallel": {"de": ""}}, "versions.de.text: String should have at least 1 character"),
        ({**GOOD, "rephrases": "x"}, "versions.en.rephrases"),
        ({**GOOD, "rephrases": [{"text": ""}]}, "versions.en.rephrases.0.text"),
        ({"id": "a", "versions": {}}, "versions: Dictionary should have at least 1 item"),
        ({"id": "a", "versions": {"de": "x"}}, r"language 'en' has no version; versions are \['de'\]"),
        ({"id": "a", "versions": {"en": "x", " ": "y"}}, "empty language code"),
        (["a"], "expected a JSON object with 'id' and 'text'"),
        ("a", "expected a JSON object"),
        (None, "expected a JSON object"),
    ],
)
def test_bad_requests_name_position_field_and_content(data: object, told: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"^request 2: .*{told}"):
        as_requests([{**GOOD, "id": "first"}, data])
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({**GOOD, "id": "first"}) + "\n\n" + json.dumps(data) + "\n", encoding="utf-8")
    with pytest.raises(FormatError, match=f"requests.jsonl, line 3: .*{told}"):
        read_requests(file)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "a", "text": ', r"line 2: not valid JSON \(Expecting value at column 21\): \{"),
        ("a,b,c", r"line 2: not valid JSON .*: a,b,c"),
        ('{"id": "a"} {"id": "b"}', "line 2: not valid JSON .Extra data at column 13"),
        ("x" * 1000, "line 2: .*x…$"),
    ],
)
def test_broken_lines_name_number_and_content(line: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({**GOOD, "id": "first"}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(FormatError, match=told) as caught:
        read_requests(file)
    assert len(str(caught.value)) < 400


def test_duplicates_and_empties(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the requests given: request id 'a' occurs twice; ids must be unique"):
        as_requests([GOOD, GOOD])
    with pytest.raises(FormatError, match="the requests given hold no edit request; give at least one"):
        as_requests([])
    file = tmp_path / "empty.jsonl"
    file.write_text("\n  \n", encoding="utf-8")
    with pytest.raises(FormatError, match="empty.jsonl hold no edit request"):
        read_requests(file)
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}", encoding="utf-8")
    with pytest.raises(FormatError, match="empty.jsonl: request id 'a' occurs twice"):
        as_requests(str(file))


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="none.jsonl does not exist"):
        read_requests(tmp_path / "none.jsonl")
    with pytest.raises(FormatError, match="cannot be read"):
        read_requests(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"id": "a", "text": "\xe9"}')
    with pytest.raises(FormatError, match="cannot be read: 'utf-8' codec"):
        read_requests(tmp_path / "latin")
    with pytest.raises(FormatError, match="cannot be written"):
        write_requests([EditRequest(**GOOD)], tmp_path / "no" / "where.jsonl")
    with pytest.raises(FormatError, match="cannot be written"):
        write_requests([EditRequest(**GOOD)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["latin"]


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert read_requests(file) == [EditRequest(**GOOD)]


text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
probes = st.lists(st.builds(Probe, text=text, text_pair=st.none() | text, target=st.none() | text), max_size=2).map(
    tuple
)
versions = st.builds(
    Version, text=text, text_pair=st.none() | text, subject=st.none() | text, rephrases=probes, locality=probes
)
requests = st.builds(
    lambda id, en, more, target: EditRequest(id=id, versions={"en": en, **more}, target=target),
    text,
    versions,
    st.dictionaries(st.sampled_from(["de", "zh", "ar"]), versions, max_size=2),
    st.none() | text,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_requests=st.lists(requests, min_size=1, max_size=3, unique_by=lambda request: request.id))
def test_written_requests_read_equal(given_requests: list[EditRequest], tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    write_requests(given_requests, file)
    assert read_requests(file) == given_requests
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]
