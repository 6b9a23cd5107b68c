"""Limits: each one refuses what is above it, says its name and how to raise it, and lets real sets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import xpatch
from xpatch.errors import FormatError
from xpatch.patches import store
from xpatch.patches.limits import Limits
from xpatch.patches.types import Gate, LanguageMask, LowRankDelta, PatchNeurons, PatchSet

MakeSet = Callable[..., PatchSet]


@pytest.fixture
def folder(make_set: MakeSet, tmp_path: Path) -> Path:
    """Two edits in two languages, 3 neurons of width 8, one gate with 4 keys, a mask of 2 languages: 8 tensors."""
    neurons = make_set(["a", "b"], unowned=1)
    gate = Gate("ball", torch.randn(4, 8), torch.rand(4))
    mask = LanguageMask(("en", "de"), torch.ones(2, 8), torch.ones(2, 8))
    low = LowRankDelta("bert.pooler.dense", torch.randn(2, 8), torch.randn(8, 2), gate="g")
    patches = PatchSet({**neurons.parts, "low": low}, neurons.edits, masks={"m": mask}, gates={"g": gate})
    return Path(store.save(patches, tmp_path / "x"))


# What the folder holds of each: the largest limit that refuses it is one less.
HELD = {"parts": 2, "tensors": 9, "edits": 2, "languages": 2, "neurons": 3 + 2 + 4, "width": 8}


@pytest.mark.parametrize("limit", [field.name for field in fields(Limits)])
def test_each_limit_is_inclusive_and_tells_how_to_raise_it(folder: Path, limit: str) -> None:
    patches = store.load(folder)
    config = (folder / store.CONFIG_FILE).read_bytes()
    header = int.from_bytes((folder / store.TENSOR_FILE).read_bytes()[:8], "little")
    held = {
        **HELD,
        "config_bytes": len(config),
        "header_bytes": header,
        "tensor_bytes": sum(tensor.numel() * 4 for tensor in patches.tensors.values()),
    }
    if limit == "signature_bytes":
        (folder / store.SIGNATURE_FILE).write_text('{"signature_version": 1, "signatures": []}')
        held[limit] = (folder / store.SIGNATURE_FILE).stat().st_size
    if limit in (
        "config_values",
        "config_depth",
    ):  # counted by the reader alone; look for the smallest that lets it through
        held[limit] = next(n for n in range(1, 1000) if _loads(folder, Limits(**{limit: n})))
    most = held[limit]
    assert store.load(folder, limits=Limits(**{limit: most})).fingerprint == patches.fingerprint
    with pytest.raises(FormatError, match=rf"expected at most {most - 1} .*\(limit '{limit}'\), found") as told:
        store.load(folder, limits=Limits(**{limit: most - 1}))
    assert f"xpatch.load(folder, limits=xpatch.Limits({limit}=" in str(told.value)


def _loads(folder: Path, limits: Limits) -> bool:
    try:
        store.load(folder, limits=limits)
    except FormatError:
        return False
    return True


def test_the_advice_works(folder: Path) -> None:
    """Whoever copies the call from the message gets the set."""
    with pytest.raises(FormatError, match=r"limits=xpatch.Limits\(neurons=9\)"):
        xpatch.load(folder, limits=xpatch.Limits(neurons=4))
    assert len(xpatch.load(folder, limits=xpatch.Limits(neurons=9))) == 2


def test_saving_knows_no_limits(tmp_path: Path) -> None:
    """A set beyond a limit saves silently, and loads when asked for: a million and one neurons of width 0 and 1."""
    many = PatchNeurons("s", torch.zeros(1_000_001, 1), torch.zeros(1_000_001), torch.zeros(1_000_001, 1), "relu")
    store.save(PatchSet({"p": many}), tmp_path / "x")
    with pytest.raises(
        FormatError, match=r"expected at most 1000000 rows .* found 1000001; .*Limits\(neurons=1000001\)"
    ):
        store.load(tmp_path / "x")
    assert store.load(tmp_path / "x", limits=Limits(neurons=1_000_001)).parts["p"].count == 1_000_001


def test_a_million_neurons_of_width_8192_are_refused_before_the_tensors_are_read(folder: Path) -> None:
    config = json.loads((folder / store.CONFIG_FILE).read_text())
    config["parts"]["neurons.0"]["tensors"] = {"keys": [999_000, 8192], "bias": [999_000], "values": [999_000, 8192]}
    (folder / store.CONFIG_FILE).write_text(json.dumps(config))
    (folder / store.TENSOR_FILE).unlink()
    with pytest.raises(FormatError, match=r"bytes of tensors \(limit 'tensor_bytes'\), found 65474460"):
        store.load(folder)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"neurons": -1}, r"Limits\(neurons=...\): expected a whole number from 0, found -1"),
        ({"parts": True}, "found True"),
        ({"edits": 1.5}, "found 1.5"),
        ({"config_depth": 201}, "expected at most 200, found 201"),
    ],
)
def test_limits_are_checked_themselves(given: dict[str, int], told: str) -> None:
    with pytest.raises(FormatError, match=told):
        Limits(**given)
