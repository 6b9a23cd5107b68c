"""Configs made to do harm: what they say is refused, in a short message, in little time and memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.patches.conftest import soon
from xpatch.errors import FormatError
from xpatch.patches import store
from xpatch.patches.limits import Limits
from xpatch.patches.types import PatchSet

MakeSet = Callable[..., PatchSet]

# What stands in the config of `make_set(["a", "b"])`, and what it becomes.
TEXTS = {
    "deep lists": ('"seconds": 1.5', '"hyperparameters": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "levels of nesting"),
    "deep lists that never end": ('"seconds": 1.5', '"x": ' + "[" * 100_000, "levels of nesting"),
    "deep objects": ('"seconds": 1.5', '"x": ' + '{"a":' * 5_000 + "1" + "}" * 5_000, "levels of nesting"),
    "brackets in texts count nothing": ('"Claim a"', '"' + "[" * 5_000 + '\\"' + "{" * 5_000 + '"', "expected fingerprint"),
    "a key twice": ('"method": "mpn"', '"method": "mpn", "method": "ft"', "the key 'method' twice"),
    "the same key twice": ('"method": "mpn"', '"method": "mpn", "method": "mpn"', "the key 'method' twice"),
    "a key twice, once escaped": ('"method": "mpn"', '"method": "mpn", "m\\u0065thod": "ft"', "the key 'method' twice"),
    "NaN": ('"seconds": 1.5', '"seconds": NaN', "found NaN, which is no JSON number"),
    "infinity": ('"seconds": 1.5', '"seconds": -Infinity', "found -Infinity"),
    "too large a number": ('"seconds": 1.5', '"seconds": 1e999', "the number 1e999, which is not finite"),
    "many digits": ('"seconds": 1.5', f'"seconds": {"9" * 5000}', "a number of 5000 digits"),
    "NaN as text": ('"seconds": 1.5', '"seconds": "nan"', "Input should be a valid number"),
    "half a pair": ('"Claim a"', '"\\ud83d"', "half a surrogate pair"),
    "half a pair in a key": ('"de": {', '"\\udc00": {', "half a surrogate pair"),
    "true for a row": ('"neurons.0": [0]', '"neurons.0": [true]', "edits.0.rows.neurons.0.0: Input should be a valid integer"),
    "text for a row": ('"neurons.0": [0]', '"neurons.0": ["0"]', "Input should be a valid integer"),
    "a row beyond every limit": ('"neurons.0": [0]', '"neurons.0": [2305843009213693951]', "limit 'neurons'"),
    "a negative row": ('"neurons.0": [0]', '"neurons.0": [-1]', "greater than or equal to 0"),
    "a huge shape": ('"bias": [2]', f'"bias": [{10**90}]', "limit 'neurons'"),
    "a shape of no axis": ('"bias": [2]', '"bias": []', "expected a shape of 1 axes"),
    "an axis of no length": ('"keys": [2, 8]', '"keys": [1000000, 0]', "tensor 'neurons.0.keys'"),
    "a path for a part": ('"neurons.0": {', '"../../neurons": {', "expected letters, digits"),
    "a set name that leads away": ('"fingerprint"', '"name": "../../etc/x", "fingerprint"', "safe as a file name"),
    "a set name with a drive": ('"fingerprint"', '"name": "C:x", "fingerprint"', "safe as a file name"),
    "a set name that commands": ('"fingerprint"', '"name": "x\\u001b[2J", "fingerprint"', "safe as a file name"),
    "a newer format": ('"format_version": 1', '"format_version": 2', "upgrade: pip install"),
    "an enormous version": ('"format_version": 1', f'"format_version": {10**99}', "upgrade: pip install"),
    "an unknown form": ('"form": "neurons"', '"form": "pickle"', "does not match any of the expected tags"),
    "an unknown field": ('"form": "neurons"', '"form": "neurons", "code": "import os"', "Extra inputs are not permitted"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_configs(folder: Path, name: str) -> None:
    old, new, told = TEXTS[name]
    place = folder / store.CONFIG_FILE
    text = place.read_text(encoding="utf-8")
    assert old in text
    place.write_text(text.replace(old, new, 1), encoding="utf-8")
    with soon(), pytest.raises(FormatError) as error:
        store.load(folder)
    assert told in str(error.value) and len(str(error.value)) < 2500


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_configs_that_are_not_utf_8(folder: Path, encoding: str) -> None:
    place = folder / store.CONFIG_FILE
    place.write_bytes(place.read_text(encoding="utf-8").replace("Claim a", "Ä").encode(encoding))
    with pytest.raises(FormatError, match="patch_config.json: expected JSON, found .* codec can't decode"):
        store.load(folder)


def test_numbers_that_share_a_hash(folder: Path) -> None:
    """Multiples of 2**61 - 1 all hash to 0: a set or a dict of them takes quadratic time."""
    config = json.loads((folder / store.CONFIG_FILE).read_text(encoding="utf-8"))
    same = [index * (2**61 - 1) for index in range(200_000)]
    config["edits"][0]["rows"] = {"neurons.0": same}
    with soon(clock=time.process_time), pytest.raises(FormatError, match="limit 'neurons'"):
        store.load({store.CONFIG_FILE: json.dumps(config).encode(), store.TENSOR_FILE: b""})
    config["edits"] = []
    config["base"] = {"id2label": {str(index): "x" for index in same}}
    with soon(clock=time.process_time), pytest.raises(FormatError, match="base.id2label: expected indices such as '0'"):
        store.load({store.CONFIG_FILE: json.dumps(config).encode(), store.TENSOR_FILE: b""})


def test_a_flood_of_faults_gives_one_short_message(folder: Path) -> None:
    config = json.loads((folder / store.CONFIG_FILE).read_text(encoding="utf-8"))
    config["edits"][0]["rows"] = {"neurons.0": ["x"] * 200_000}
    with (
        soon(clock=time.process_time),
        pytest.raises(FormatError, match="200000 values do not fit the format") as error,
    ):
        store.load({store.CONFIG_FILE: json.dumps(config).encode(), store.TENSOR_FILE: b""})
    assert len(str(error.value)) < 200


def test_deep_hyperparameters_of_real_sets_load(make_set: MakeSet, tmp_path: Path) -> None:
    nested: Any = 1
    for _ in range(40):
        nested = {"x": [nested]} if isinstance(nested, int) else {"x": nested}
    patches = make_set(["a"])
    patches = replace(patches, edits=(replace(patches.edits[0], hyperparameters=nested),))
    assert store.load(store.save(patches, tmp_path / "x")).fingerprint == patches.fingerprint


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux")
def test_memory_stays_bounded() -> None:
    """The worst known configs, at a tenth of the default limits: at most 1 KiB for each JSON value."""
    values = 200_000
    limits = Limits(config_values=values, config_bytes=8 << 20)
    head = '{"format_version":1,"written_by":"x","fingerprint":"' + "0" * 64 + '","parts":{},'
    edit = head + '"edits":[{"id":"a","method":"m","status":"edited",'
    request = edit + '"request":{"id":"a","versions":{"en":{"text":"x","rephrases":['

    def listed(start: str, item: str, end: str) -> bytes:
        return (start + ",".join([item] * (values - 50)) + end).encode()

    hostile = {
        "empty rephrases": listed(request, '""', "]}}}}]}"),
        "rephrases": listed(request, '"x"', "]}}}}]}"),
        "rows": listed(edit + '"rows":{"p":[', '"x"', "]}}]}"),
        "keys": (head + ",".join(f'"k{index}":1' for index in range(values - 50)) + "}").encode(),
        "long text": (edit + '"message":"' + "\\u4e2d" * (1 << 20) + '"}]}').encode(),
    }
    for name, config in hostile.items():
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        with pytest.raises(FormatError):
            store.load({store.CONFIG_FILE: config, store.TENSOR_FILE: b""}, limits=limits)
        assert memory("VmHWM") - before < values * 1024 + 3 * len(config), name


def memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])
