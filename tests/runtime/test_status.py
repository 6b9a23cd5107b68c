"""`xpatch.status`: what it shows, as a table and as data, and how it switches the counters."""

from __future__ import annotations

import json

import pytest
import torch

import xpatch
from xpatch import LowRankDelta, PatchNeurons, PatchSet
from xpatch.patches.types import EditRecord
from xpatch.runtime.attach import runtime_of
from xpatch.runtime.columns import columns
from xpatch.runtime.status import Status

SITE, DOWN = "bert.encoder.layer.1", "bert.encoder.layer.0.output.dense"


@pytest.fixture
def model(tiny):
    """Two sets: two edits with four neurons, of which two always fire; and a low-rank delta elsewhere."""
    model = tiny("bert")
    bias = torch.tensor([1.0, 1.0, -1.0, 0.0])
    part = PatchNeurons(SITE, torch.zeros(4, 32), bias, torch.randn(4, 32), "relu")
    edits = [EditRecord(id=id, method="by-hand", status="edited") for id in ("one", "two")]
    xpatch.apply(model, PatchSet(parts={"part": part}, edits=tuple(edits)), name="a")
    xpatch.apply(model, PatchSet(parts={"delta": LowRankDelta(DOWN, torch.randn(2, 64), torch.randn(32, 2))}), name="b")
    return model


def test_sets_parts_and_sites(model):
    found = xpatch.status(model)
    assert [(item.name, item.edits, item.expired) for item in found.sets] == [("a", 2, ()), ("b", 0, ())]
    assert found.names == ("a", "b") and found.sites == (SITE, DOWN)
    assert [(s.site, s.parts, s.count, s.bytes) for s in found.per_site] == [
        (SITE, 1, 4, 4 * (4 * 64 + 4)),
        (DOWN, 1, 2, 4 * 2 * 96),
    ]
    assert found.bytes == sum(site.bytes for site in found.per_site)
    assert found.parts[0].kernel in ("native", "reference") and found.parts[1].kernel == "reference"


@torch.no_grad()
def test_the_counters_can_be_switched(model, token_ids):
    xpatch.status(model, count=False)
    model(token_ids)
    assert [part.fired for part in xpatch.status(model).parts] == [None, None]
    assert [part.fired for part in xpatch.status(model, count=True).parts] == [0, None]
    model(token_ids)
    found = xpatch.status(model)
    assert [part.fired for part in found.parts] == [6, None]
    assert [site.fired for site in found.per_site] == [6, None]
    assert xpatch.status(model, count=True).parts[0].fired == 0  # again from zero
    assert runtime_of(model).firings.cpu_only is False
    assert xpatch.status(model, count=False).parts[0].fired is None


def test_two_sets_at_one_site_add_up(model):
    more = PatchNeurons(SITE, torch.zeros(3, 32), torch.ones(3), torch.randn(3, 32), "relu")
    xpatch.apply(model, PatchSet(parts={"part": more}), name="c")
    assert [(s.site, s.parts, s.count) for s in xpatch.status(model).per_site] == [(SITE, 2, 7), (DOWN, 1, 2)]


def test_prints_a_table_and_plain_data(model, tiny):
    text = str(xpatch.status(model, count=True))
    lines = text.split("\n")
    assert lines[0].startswith("a  2 edits  ") and lines[1].startswith("b  0 edits  ")
    assert lines[2].split() == ["set", "part", "site", "form", "count", "bytes", "kernel", "fired"]
    assert lines[3].split()[:5] == ["a", "part", SITE, "neurons", "4"] and lines[3].endswith("0")
    assert lines[4].endswith("-")
    data = json.loads(json.dumps(xpatch.status(model).to_dict()))
    assert data["parts"][0]["site"] == SITE and [site["site"] for site in data["sites"]] == [SITE, DOWN]
    assert str(xpatch.status(tiny("bert"))) == "no patches applied" and xpatch.status(tiny("bert")) == Status()


def test_columns_are_aligned_for_wide_signs():
    text = columns(("text", "n"), [("北京", 1), ("cafe\u0301", None), ("plain", 22)])
    assert text.split("\n") == ["text   n", "北京   1", "cafe\u0301   -", "plain  22"]
