"""Texts as people give them, and messages that name the place."""

from __future__ import annotations

import pytest

from xpatch import EditRequest, FormatError
from xpatch.patches.requests import Probe
from xpatch.watch.texts import Text, as_texts, texts_of


def test_strings_probes_mappings_and_texts():
    items = [
        "one",
        Probe(text="two", text_pair="b"),
        {"text": "three", "language": "de"},
        Text(Probe(text="four"), "fr"),
    ]
    assert [(t.probe.text, t.probe.text_pair, t.language) for t in as_texts(items)] == [
        ("one", None, None),
        ("two", "b", None),
        ("three", None, "de"),
        ("four", None, "fr"),
    ]


def test_plain_lines(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\ufefffirst line\n\n  {not json}  \nThe\u2028same line\n", encoding="utf-8")
    assert [text.probe.text for text in as_texts(path)] == ["first line", "{not json}", "The\u2028same line"]


def test_jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        '{"text": "北京", "language": "zh"}\n\n"a string"\n{"text": "a", "text_pair": "b"}\n', encoding="utf-8"
    )
    found = as_texts(str(path))
    assert [(t.probe.text, t.probe.text_pair, t.language) for t in found] == [
        ("北京", None, "zh"),
        ("a string", None, None),
        ("a", "b", None),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
        ('{"language": "en"}', "line 1: text"),
        ('{"text": "a", "language": 5}', "line 1: language"),
        ('{"text": "a", "colour": "red"}', "line 1: colour"),
        ("7", "line 1"),
        ("", "expected at least one text"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, words):
    path = tmp_path / "texts.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=words):
        as_texts(path)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        as_texts(tmp_path / "no.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(FormatError, match="cannot be read"):
        as_texts(tmp_path / "latin.txt")
    with pytest.raises(FormatError, match="text 2: text"):
        as_texts(["one", ""])
    with pytest.raises(FormatError, match="the texts given: expected at least one"):
        as_texts([])


def test_every_text_of_requests_once():
    requests = [
        EditRequest(
            id="a",
            versions={"en": {"text": "one", "rephrases": ["two"], "locality": ["three"]}, "de": {"text": "eins"}},
        ),
        EditRequest(id="b", versions={"en": {"text": "two", "locality": ["one"]}}),
    ]
    assert [(t.language, t.probe.text) for t in texts_of(requests)] == [
        ("en", "one"), ("en", "two"), ("en", "three"), ("de", "eins")
    ]  # fmt: skip
