"""`xpatch store`: the whole round on folders, what is printed for people and for machines, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xpatch

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
Run = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two patch folders: the golden set, and the same without its first edit's request."""
    golden = xpatch.load(GOLDEN)
    return Path(xpatch.save(golden, tmp_path / "one")), Path(xpatch.save(golden.redact(), tmp_path / "two"))


def fingerprint(folder: Path) -> str:
    return xpatch.load(folder).fingerprint


def done(result: Any) -> Any:
    assert result.code == 0, result
    return json.loads(result.out) if result.out.startswith("{") else result.out


def test_publish_look_and_roll_back(run: Run, store: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = (fingerprint(folder) for folder in two)
    first = done(run("store", "publish", store, two[0], "--message", "first [1]", "--author", "ann", "--json"))
    assert (first["after"], first["before"], first["number"], first["author"]) == (one, None, 1, "ann")
    assert done(run("store", "publish", store, two[1], "-m", "redacted")).startswith("production #2")
    assert done(run("store", "publish", store, "--from", one[:8], "--pointer", "staging", "--json"))["after"] == one

    listing = done(run("store", "list", store))
    for part in (one[:12], other[:12], "production", "staging", "redacted"):
        assert part in listing
    machine = done(run("store", "list", store, "--json"))
    assert {item["fingerprint"] for item in machine["sets"]} == {one, other}
    assert [move["pointer"] for move in machine["pointers"]] == ["production", "staging"]

    difference = done(run("store", "diff", store, one[:8]))
    assert f"{one[:12]} -> {other[:12]}: 0 added, 0 removed" in difference and "request" in difference
    assert done(run("store", "diff", store, "staging", "production", "--json"))["changed"]

    assert done(run("store", "rollback", store, "--message", "hurts", "--json"))["after"] == one
    history = done(run("store", "history", store))
    assert "first [1]" in history and history.index("hurts") < history.index("redacted") < history.index("first")
    assert [move["action"] for move in done(run("store", "history", store, "--json"))["moves"]] == [
        "publish",
        "publish",
        "rollback",
    ]
    assert done(run("store", "rollback", store, "--to", other[:8], "--expect", "staging", "--json"))["after"] == other

    assert done(run("store", "get", store, "staging", "--out", tmp_path / "got", "--json"))["fingerprint"] == one
    assert fingerprint(tmp_path / "got") == one


def test_gc_and_verify(run: Run, store: Path, two: tuple[Path, Path]) -> None:
    done(run("store", "publish", store, two[0]))
    xpatch.PatchStore(store)._sets.put(xpatch.load(two[1]))
    (store / "tmp" / "left").mkdir()
    loose = fingerprint(two[1])
    assert done(run("store", "gc", store, "--json"))["removed"] == []
    dry = done(run("store", "gc", store, "--grace", "0", "--dry-run"))
    assert loose in dry and "tmp/left" in dry and "would remove 1 set and 1 leftover" in dry
    assert done(run("store", "gc", store, "--grace", "0", "--json"))["removed"] == [loose]
    assert done(run("store", "verify", store, "--json"))["ok"] is True
    assert "1 set and 1 move looked at, 0 leftovers, no damage" in done(run("store", "verify", store))
    one = fingerprint(two[0])
    shutil.rmtree(store / "sets" / one[:2] / one)
    broken = run("store", "verify", store)
    assert broken.code == 1 and one[:12] in broken.out and "kept by production" in broken.out
    assert run("store", "verify", store, "--json").code == 1


def test_the_gate(
    run: Run, store: Path, trained: Path, model_folder: Path, requests_file: Path, tmp_path: Path
) -> None:
    words = ("store", "publish", store, trained, "--model", model_folder)
    move = done(run(*words, "--must-hold", requests_file, "--json"))
    assert move["checked"] == {"must_hold": 4}
    shutil.rmtree(store)
    keep = tmp_path / "keep.jsonl"
    keep.write_text('{"text": "The capital of France is Berlin.", "language": "en"}\n', encoding="utf-8")
    refused = run(*words, "--must-not-change", keep)
    assert refused.code == 2 and refused.out == "" and not store.exists()
    for part in (
        "1 of 1 predictions that must not change did:",
        "[en] 'The capital of France is Berlin.': SUPPORTS -> REFUTES",
    ):
        assert part in refused.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("list", "nowhere"), "expected a patch store, found nothing"),
        (("publish", "S"), "either a patch folder or --from"),
        (("publish", "S", "fixes", "--from", "x"), "either a patch folder or --from"),
        (("publish", "S", "fixes", "--must-hold", "x.jsonl"), "need --model"),
        (("publish", "S", "nowhere"), "expected a patch folder, found nothing"),
        (("publish", "S", str(GOLDEN), "--pointer", "a/b"), "pointer, name"),
        (("publish", "S", str(GOLDEN), "--expect", "production"), "expected a patch store, found nothing"),
        (("rollback", "S"), "expected a patch store, found nothing"),
    ],
)
def test_refusals(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("store", *words)
    assert result.code == 2 and told in result.err and result.out == "" and "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


def test_conflicts(run: Run, store: Path, two: tuple[Path, Path]) -> None:
    done(run("store", "publish", store, two[0], "--expect", "none"))
    refused = run("store", "publish", store, two[1], "--expect", "none")
    assert refused.code == 2 and fingerprint(two[0])[:12] in refused.err and fingerprint(two[1])[:12] in refused.err
    nowhere = run("store", "rollback", store)
    assert nowhere.code == 2 and "expected 1 earlier to go back to, found 0" in nowhere.err


@pytest.mark.parametrize("command", ["list", "publish", "rollback", "history", "diff", "get", "gc", "verify"])
def test_every_command_has_an_example_and_json(run: Run, command: str) -> None:
    text = run("store", command, "--help").out
    assert f"Example: xpatch store {command} " in text and "--json" in text
