"""The fuzzer: the loader withstands it, it starts from folders as `save` writes them, and it would notice a weaker loader."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from xpatch.benchmarks import fuzz
from xpatch.benchmarks.fuzz_files import CONFIG, SIGNATURE, TENSORS, files_of, read_folder, seeds
from xpatch.benchmarks.fuzz_oracle import faults
from xpatch.errors import FormatError
from xpatch.patches import checks, config, ledger, names, store, strict_json, tensorfile

OUTCOMES = ("crashed", "wrongly_accepted", "refused", "accepted_equal", "accepted_valid")


@pytest.mark.parametrize("name", seeds())
def test_folders_made_by_hand_are_those_save_writes(name: str, tmp_path: Path) -> None:
    """Format and fingerprint, written a second time from their description, agree with the library's to the byte."""
    files = files_of(seeds()[name])
    patches = xpatch.load(files)
    assert faults(patches, files, xpatch.Limits()) == []
    folder = Path(xpatch.save(patches, tmp_path / "x"))
    written = {**json.loads((folder / CONFIG).read_bytes()), "written_by": None}
    assert written == {**json.loads(files[CONFIG]), "written_by": None}
    if name != "golden":
        assert (folder / TENSORS).read_bytes() == files[TENSORS]
    assert (folder / SIGNATURE).exists() == bool(patches.signatures) == (SIGNATURE in files)
    again = read_folder({file: (folder / file).read_bytes() for file in (CONFIG, TENSORS)})
    assert again.config["fingerprint"] == patches.fingerprint


def test_the_loader_withstands_two_thousand_files() -> None:
    found = fuzz.run(2000, seed=0, progress=False)
    assert found["failures"] == [] and found["crashed"] == found["wrongly_accepted"] == 0
    assert found["files"] == 2000 == sum(found[outcome] for outcome in OUTCOMES)
    assert found["refused"] > 1500 and found["accepted_equal"] > 50 and found["accepted_valid"] > 20


@pytest.mark.slow
def test_the_loader_withstands_a_hundred_thousand_files() -> None:
    found = fuzz.run(100_000, seed=2, progress=False)
    assert found["failures"] == [] and found["crashed"] == found["wrongly_accepted"] == 0


def test_a_case_depends_on_seed_and_index_alone() -> None:
    whole = fuzz.run(60, seed=3, progress=False)
    halves = [fuzz.run(30, seed=3, progress=False, first=first) for first in (0, 30)]
    assert {key: whole[key] for key in OUTCOMES} == {key: sum(half[key] for half in halves) for key in OUTCOMES}
    one = fuzz.case(3, 41)
    fuzz.run(20, seed=9, progress=False)
    assert fuzz.case(3, 41) == one != fuzz.case(3, 42) and fuzz.case(4, 41) != one


def test_one_case_can_be_written_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seed", "3", "--only", "41", "--out", str(tmp_path / "case")])
    fuzz.main()
    assert {path.name: path.read_bytes() for path in (tmp_path / "case").iterdir()} == fuzz.case(3, 41)


def test_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "--files", "10", "--json", str(tmp_path / "f.json")])
    fuzz.main()
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["files"] == 10 and result["seeds"] == [0] and json.loads(capsys.readouterr().out)["files"] == 10


def unfinite(value: torch.Tensor, where: str, axes: Any, sizes: Any) -> torch.Tensor:
    return value


# What is taken out of the loader -> what the fuzzer must then report.
WEAKER: dict[str, tuple[Any, str, Any, str]] = {
    "keys may repeat": (strict_json, "_object", dict, "a key occurs twice"),
    "numbers may be infinite": (checks, "frozen_tensor", unfinite, "not finite"),
    "tensors may lie anywhere": (tensorfile, "_check_layout", lambda *a: None, "crashed"),
    "ledgers are not checked": (ledger, "owners", lambda patches: {}, "owns rows that do not exist"),
    "set names are not checked": (config, "check_set_name", lambda *a: None, "set name"),
    "the fingerprint is the config's word": (config, "fingerprint", None, "fingerprint"),
    "no limit holds": (xpatch.Limits, "check", lambda *a: None, "limit "),
}


@pytest.mark.parametrize("name", WEAKER)
def test_a_weaker_loader_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, weaker, told = WEAKER[name]
    if weaker is None:
        real = store.parse_config

        def trusting(*given: Any, **more: Any) -> Any:
            parsed = real(*given, **more)
            monkeypatch.setattr(config, "fingerprint", lambda patches: parsed.fingerprint)
            return parsed

        monkeypatch.setattr(store, "parse_config", trusting)
    else:
        monkeypatch.setattr(module, attribute, weaker)
        if module is checks:
            monkeypatch.setattr("xpatch.patches.forms.checks.frozen_tensor", weaker)
    found = fuzz.run(700, seed=0, progress=False)
    if told == "crashed":
        assert found["crashed"] + found["wrongly_accepted"] > 0
    else:
        assert found["wrongly_accepted"] > 0 and any(told in what for _, what in found["failures"]), found


@pytest.mark.parametrize(
    "error", [RecursionError, MemoryError, KeyError, UnicodeEncodeError("utf-8", "x", 0, 1, "y"), None]
)
def test_another_error_or_a_hang_is_a_crash(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*given: Any, **more: Any) -> None:
        if error is not None:
            raise error
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(fuzz, "SECONDS_AT_MOST", 0.05)
    monkeypatch.setattr(xpatch, "load", bad)
    found = fuzz.run(2, seed=0, progress=False)
    assert found["crashed"] == 2 and len(found["failures"]) == 2


def test_a_refusal_that_takes_too_long_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*given: Any, **more: Any) -> None:
        began = time.perf_counter()
        try:
            while True:
                time.sleep(0.01)
        except fuzz.Hang:
            assert time.perf_counter() - began >= 0.05
            raise FormatError("late") from None

    monkeypatch.setattr(fuzz, "SECONDS_AT_MOST", 0.05)
    monkeypatch.setattr(xpatch, "load", slow)
    assert fuzz.run(1, seed=0, progress=False)["crashed"] == 1


def test_names_are_judged_by_two_rules_that_agree() -> None:
    """The loader's rule for set names and the oracle's own: whatever the first lets through, the second does."""
    from xpatch.benchmarks.fuzz_oracle import _name_faults
    from xpatch.patches.types import PatchSet

    for name in ("a", "v1.2", "名前", "x" * 200, "a b", "-", "~", "C", "con"):
        assert names.is_safe(name) and _name_faults(PatchSet({}, name=name)) == []
    for name in ("../a", "a/b", "C:", "..", "a\x07"):
        assert not names.is_safe(name) and _name_faults(PatchSet({}, name=name)) != []
