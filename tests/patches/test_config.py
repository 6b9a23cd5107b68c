"""The schema of `patch_config.json`: what it refuses, and that the committed JSON schemas are current."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from xpatch.errors import FormatError
from xpatch.patches import config
from xpatch.patches.types import PatchSet

MakeSet = Callable[..., PatchSet]


@pytest.mark.parametrize("name", config.schema_files())
def test_committed_schemas_are_current(name: str) -> None:
    committed = (Path(config.__file__).parent / name).read_text(encoding="utf-8")
    assert json.loads(committed) == json.loads(config.schema_files()[name]), "run: python -m xpatch.patches.config"


def test_schemas_are_rewritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.main(tmp_path)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == config.schema_files()
    assert config.CONFIG_SCHEMA_FILE in capsys.readouterr().out


def test_request_schema_takes_both_forms() -> None:
    full, flat = config.request_schema()["anyOf"]
    assert set(full["required"]) == {"id", "versions"} and set(flat["required"]) == {"id", "text"}
    assert "parallel" in flat["properties"] and "versions" not in flat["properties"]


def test_round_trip_through_text(make_set: MakeSet) -> None:
    patches = make_set(["ä", "中"])
    text = config.config_json(patches, name=None)
    parsed = config.parse_config(text, where="here")
    assert parsed.fingerprint == patches.fingerprint and parsed.name is None
    assert [edit.request for edit in parsed.edits] == [record.request for record in patches]
    assert '"keys": [2, 8]' in text and "中" in text


def test_number_lists_in_texts_are_left_alone(make_set: MakeSet) -> None:
    from dataclasses import replace

    patches = make_set(["a"])
    message = "[\n 1,\n 2\n]"
    patches = replace(patches, edits=(replace(patches.edits[0], message=message),))
    assert config.parse_config(config.config_json(patches, name=None), where="x").edits[0].message == message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"format_version": 2},
            "here: expected format version 1 or older, found 2, .* upgrade: pip install --upgrade xpatch",
        ),
        ({"format_version": None}, "here: expected a patch config with a 'format_version', found None"),
        ({"format_version": True}, "found True"),
        ({"format_version": 0}, "here: format_version: Input should be 1"),
        ({"extra": 1}, "here: extra: Extra inputs are not permitted; found '1'"),
        ({"fingerprint": "abc"}, "here: fingerprint: String should match pattern"),
        ({"parts": {"p": {"form": "magic"}}}, "here: parts.p: .*'magic'"),
        (
            {"parts": {"p": {"form": "dense", "site": "s", "tensors": {"weight": [-1]}}}},
            "greater than or equal to 0; found '-1'",
        ),
        (
            {"parts": {"p": {"form": "dense", "site": "s", "tensors": {}, "activation": "relu"}}},
            "activation: Extra inputs",
        ),
        ({"edits": [{"id": "a", "method": "mpn"}]}, "here: edits.0.status: Field required"),
        (
            {"edits": [{"id": "a", "method": "mpn", "status": "edited", "request": {"id": "a"}}]},
            "edits.0.request.versions",
        ),
    ],
)
def test_bad_configs_are_refused(make_set: MakeSet, change: dict[str, object], told: str) -> None:
    data = json.loads(config.config_json(make_set(["a"]), name=None))
    with pytest.raises(FormatError, match=told):
        config.parse_config(json.dumps({**data, **change}), where="here")


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[1]", "3"])
def test_what_is_no_config_is_refused(text: str | bytes) -> None:
    with pytest.raises(FormatError, match=r"^here: expected"):
        config.parse_config(text, where="here")
