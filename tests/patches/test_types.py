"""The ledger and `PatchSet`: what they promise, refuse, and never let change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from xpatch.errors import FormatError, MismatchError
from xpatch.patches.requests import EditRequest, Probe, Version
from xpatch.patches.types import EditRecord, Gate, LanguageMask, PatchNeurons, PatchSet

MakeSet = Callable[..., PatchSet]


def record(**changes: object) -> EditRecord:
    return EditRecord(**{"id": "a", "method": "mpn", "status": "edited", **changes})


def test_records_freeze_what_they_are_given() -> None:
    request = EditRequest(id="a", text="Claim")
    hyperparameters = {"steps": np.int64(3), "rate": np.float32(0.5), "languages": ["en"], "memory": {"rows": 2}}
    made = record(request=request, hyperparameters=hyperparameters, rows={"p": [2, 0]}, seconds=2)
    request.versions["de"] = Version(text="Satz")
    hyperparameters["languages"].append("de")
    assert made.request is not None and set(made.request.versions) == {"en"}
    assert made.hyperparameters == {"steps": 3, "rate": 0.5, "languages": ("en",), "memory": {"rows": 2}}
    assert made.rows == {"p": (0, 2)} and made.seconds == 2.0
    with pytest.raises(TypeError):
        made.rows["p"] = ()
    with pytest.raises(TypeError):
        made.hyperparameters["memory"]["rows"] = 3
    assert pickle.loads(pickle.dumps(made)) == made and copy.deepcopy(made) is made


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": ""}, "edit, id: expected a non-empty string"),
        (
            {"status": "done"},
            "edit 'a', status: expected one of edited, already-right, failed, lost, rejected, found 'done'",
        ),
        (
            {"status": "rejected", "rows": {"p": (0,)}},
            "expected a rejected edit to own no rows and belong to no group, found rows in",
        ),
        ({"status": "rejected", "group": "g"}, "and group 'g'; correct the status"),
        ({"request": {"id": "a"}}, "edit 'a', request: expected an EditRequest, found dict"),
        ({"request": EditRequest(id="b", text="x")}, "expected a request of the same id, found 'b'"),
        ({"rows": {"p": (0, 0)}}, "part 'p': expected row indices, each once"),
        ({"rows": {"p": (-1,)}}, "part 'p': expected row indices"),
        ({"rows": {"p": 1}}, "part 'p': expected row indices"),
        ({"hyperparameters": {"rate": float("nan")}}, "hyperparameters.rate: expected a finite number, found nan"),
        (
            {"hyperparameters": {"dtype": torch.float32}},
            "hyperparameters.dtype: expected text, a number, a list or a mapping",
        ),
        ({"seed": "7"}, "seed: expected a whole number, found '7'"),
        ({"created": 3}, "created: expected text, found int"),
        ({"seconds": "fast"}, "seconds: expected a number, found 'fast'"),
    ],
)
def test_bad_records_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(FormatError, match=told):
        record(**changes)


def test_set_is_a_read_only_value(make_set: MakeSet) -> None:
    patches = make_set(["a", "b"], unowned=1)
    assert len(patches) == 2 and [edit.id for edit in patches] == ["a", "b"] and patches.edit("b").id == "b"
    assert patches.languages == ("de", "en") and patches.nbytes == 4 * 3 * (8 + 1 + 8)
    assert list(patches.tensors) == ["neurons.0.keys", "neurons.0.bias", "neurons.0.values"]
    assert "edits=2" in repr(patches) and bool(PatchSet({}))
    with pytest.raises(AttributeError):
        patches.name = "other"
    with pytest.raises(TypeError):
        patches.parts["x"] = patches.parts["neurons.0"]
    assert copy.deepcopy(patches) is patches
    assert pickle.loads(pickle.dumps(patches)).fingerprint == patches.fingerprint
    with pytest.raises(MismatchError, match=r"edit 'bb' is not in this patch set of 2 edits; it holds 'b'"):
        patches.edit("bb")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parts": {"p": 3}}, "part 'p': expected a part .* found int"),
        ({"parts": []}, "patch set, parts: expected a mapping"),
        ({"masks": {"a b": None}}, "mask 'a b', name: expected letters"),
        ({"base": "bert"}, "base: expected a BaseIdentity, found str"),
        ({"edits": [record(), record()]}, "edit id 'a' occurs twice"),
        ({"edits": [{"id": "a"}]}, "edits: expected EditRecord, found dict"),
        ({"edits": [record(rows={"q": (0,)})]}, "part 'q' owns rows in the ledger, found only"),
        ({"edits": [record(rows={"p": (2,)})]}, "edit 'a', part 'p', row 2: expected a row below 2"),
        (
            {"edits": [record(rows={"p": (1,)}), record(id="b", rows={"p": (1,)})]},
            "edit 'b', part 'p', row 1: .* found 'a' too",
        ),
    ],
)
def test_bad_sets_are_refused(changes: dict[str, object], told: str) -> None:
    part = PatchNeurons("s", torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), "relu")
    with pytest.raises(FormatError, match=told):
        PatchSet(**{"parts": {"p": part}, **changes})


def test_parts_must_find_what_they_name() -> None:
    def part(**names: str) -> PatchNeurons:
        return PatchNeurons("s", torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), "relu", **names)

    with pytest.raises(FormatError, match=r"part 'p' at 's': mask 'm' is missing; found masks \['n'\]"):
        PatchSet({"p": part(mask="m")}, masks={"n": LanguageMask(("en",), torch.ones(1, 3), torch.ones(1, 3))})
    with pytest.raises(FormatError, match="gate 'g' is missing"):
        PatchSet({"p": part(gate="g")})
    with pytest.raises(FormatError, match="expected mask 'm' of widths 3 and 3, found inner"):
        PatchSet({"p": part(mask="m")}, masks={"m": LanguageMask(("en",), torch.ones(1, 3), torch.ones(1, 4))})
    with pytest.raises(FormatError, match="expected gate 'g' with keys of width 3"):
        PatchSet({"p": part(gate="g")}, gates={"g": Gate("ball", torch.ones(1, 4), torch.ones(1))})
    with pytest.raises(FormatError, match="does not begin with 'masks.'"):
        PatchSet({"masks.p": part()})


def test_fingerprint_knows_content_only(make_set: MakeSet) -> None:
    patches = make_set(["a", "b"])
    later = tuple(replace(edit, created="2027-01-01T00:00:00Z", seconds=9.0) for edit in patches)
    assert len(patches.fingerprint) == 64
    assert replace(patches, name="x", edits=later).fingerprint == patches.fingerprint
    part = patches.parts["neurons.0"]
    touched = part.keys.clone()
    touched[0, 0] = torch.nextafter(touched[0, 0], torch.tensor(9.0))
    for other in (
        replace(patches, parts={"neurons.0": replace(part, keys=touched)}),
        replace(patches, parts={"neurons.0": replace(part, activation="gelu")}),
        replace(patches, edits=(replace(patches.edits[0], seed=1), patches.edits[1])),
        patches.redact("author"),
    ):
        assert other.fingerprint != patches.fingerprint
    two = {"a": part, "b": replace(part, activation="gelu")}
    assert PatchSet(two).fingerprint == PatchSet(dict(reversed(two.items()))).fingerprint


def test_redact(make_set: MakeSet) -> None:
    version = Version(text="Claim", subject="S", rephrases=(Probe(text="R"),), target="A")
    request = EditRequest(id="a", versions={"en": version}, target="B", author="me", reason="because")
    patches = replace(make_set(["a"]), edits=(record(request=request, message="said Claim", rows={"neurons.0": (0,)}),))
    less = patches.redact(["author", "target", "rephrases"]).edit("a").request
    assert less is not None and (less.author, less.reason, less.target) == (None, "because", None)
    assert less.versions["en"] == Version(text="Claim", subject="S")
    nothing = patches.redact().edit("a")
    assert nothing.request is None and nothing.message is None and nothing.rows == {"neurons.0": (0,)}
    assert patches.redact().redact("author").edit("a").request is None
    assert patches.edit("a").request == request
    with pytest.raises(FormatError, match=r"expected 'all' or fields among author, .* found text"):
        patches.redact("text")
