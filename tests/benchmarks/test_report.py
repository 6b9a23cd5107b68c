"""The page and the charts are whole, self-contained, escaped and readable."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from xpatch.benchmarks import paper, report, svg
from xpatch.benchmarks.latency import measure

LANGUAGES = ("en", "de", "zh")


def row(name, method, preset, value):
    per = dict.fromkeys(LANGUAGES, value)
    return {
        "name": name, "method": method, "preset": preset, "patches": 3, "reliability": value, "mlg": value, "clg": {"de": value, "zh": value},
        "clg_avg": value, "clg_needed": per, "clg_needed_avg": value, "clg_unseen": per, "clg_unseen_avg": value, "clg_unseen_any": per,
        "locality_train": value, "locality_test": value, "unchanged": per, "unchanged_avg": value, "edits": 3, "edits_per_s": 12.3,
        "intervals": {"reliability": [value - 2, value + 1], "clg": {"de": [value - 2, value + 1], "zh": [value - 2, value + 1]}},
        "paper": paper.row(method),
    }  # fmt: skip


@pytest.fixture
def result():
    return {
        "header": {"machine": {"cpu": "A <CPU>", "cores": 2, "gpu": None}, "versions": {"torch": "2"}, "seeds": [0], "command": "x", "date": "d"},
        "protocol": {"edit_set": 3, "rules": ["a < b"]},
        "methods": [row("Original model", "original", None, 70.0), row("MPN (all)", "mpn", "paper", 90.0), row("MPN (all)", "mpn", "default", 98.0)],
        "examples": [
            {"id": "1", "target": "SUPPORTS", "languages": {
                "en": {"text": "a <b> & c", "before": "REFUTES", "after": "SUPPORTS"}, "ar": {"text": "نص", "before": "REFUTES", "after": "REFUTES"}}}
        ],
        "latency": {"PyTorch, patched": {"p50_ms": 1.5, "iqr_ms": 0.1}},
        "goals": [{"what": "x", "at_least": 98.0, "found": 97.0, "met": False}],
    }  # fmt: skip


class Checker(HTMLParser):
    """Every opened element is closed, in order."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "line", "rect", "path", "polyline"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_self_contained_and_escaped(result, tmp_path):
    path = report.write(result, tmp_path / "sub" / "report.html")
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not re.search(r"""(src|href)=|@import|url\(""", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "a &lt;b&gt; &amp; c" in text and "A &lt;CPU&gt;" in text and "a &lt; b" in text
    assert 'lang="ar" dir=auto' in text and "97.2" in text and "prints a mean of 96.94" in text
    assert "not met" in text and "1.50" in text and "prefers-color-scheme" in text
    assert len(text) < 200_000


def test_charts_are_svg_files(result, tmp_path):
    for path in report.write_charts(result, tmp_path):
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert root.attrib["role"] == "img" and root.attrib["aria-label"]
        assert "98.0" in path.read_text()
    assert not list(tmp_path.glob("*.tmp"))


def test_charts_show_the_default_preset(result):
    assert [row["preset"] for row in report.best_rows(result["methods"])] == [None, "default"]


def test_terminal_table_has_the_published_row_once_a_method(result):
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(report.table(result))
    text = console.file.getvalue()
    assert text.count("published ") == 2 and "MPN (all) default" in text and "97.2" in text


def test_a_result_with_less_still_makes_a_page(result):
    bare = {
        "methods": [
            {k: v for k, v in row.items() if k not in ("intervals", "paper", "clg_unseen_any")}
            for row in result["methods"]
        ]
    }
    assert "<table>" in report.page(bare)


def test_points_carry_value_interval_and_reference():
    text = svg.points("t", ["en"], [svg.Series("A & B", [91.0], [(90.0, 92.0)], [93.0])])
    root = ElementTree.fromstring(text)
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["A & B, en: 91.0 % (95 % interval 90.0 to 92.0); published: 93.0 %"]
    assert "published" in text


def test_a_missing_value_is_left_out():
    assert "<title>" not in svg.points("t", ["en"], [svg.Series("A", [None])])


def test_lines_place_the_smallest_left_and_larger_values_higher():
    text = svg.lines("t", [svg.Panel("p", [svg.Line("a", [(10, 90, 89, 91), (100, 95, 94, 96)])])], "x")
    points = ElementTree.fromstring(text).find(".//{*}polyline").attrib["points"].split()
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in points)
    assert x0 < x1 and y0 > y1


def test_paper_rows_and_their_arithmetic():
    for method in ("original", "ft", "t-patcher", "mpn-only", "mpn"):
        found = paper.row(method)
        assert sum(found["clg"].values()) / 5 == pytest.approx(found["clg_avg"], abs=0.01)
        assert ("note" in found) == (method in ("mpn-only", "mpn"))
    assert paper.row("rome") is None


def test_latency_is_interleaved_and_summarised():
    order = []
    found = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=15, warmup=1)
    assert order == ["a", "b"] + (["a", "b", "b", "a"] * 8)[:30]
    assert set(found) == {"a", "b"} and all(set(x) == {"p50_ms", "iqr_ms"} for x in found.values())
    with pytest.raises(ValueError, match="15"):
        measure({"a": lambda: None}, repeats=3)
