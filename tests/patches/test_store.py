"""Folders: exact round trips, replacement as a whole, and one clear message for every damaged or forbidden one."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpatch.errors import FormatError
from xpatch.patches import store
from xpatch.patches.types import DenseDelta, EditRecord, Gate, LanguageMask, LowRankDelta, PatchNeurons, PatchSet

MakeSet = Callable[..., PatchSet]
GOLDEN = Path(__file__).parent.parent / "golden"


def same(one: PatchSet, two: PatchSet) -> bool:
    bits = {name: tensor.view(torch.int32) for name, tensor in one.tensors.items()}
    return (
        one.fingerprint == two.fingerprint
        and one.edits == two.edits
        and one.base == two.base
        and list(one.parts) == list(two.parts)
        and all(torch.equal(bits[name], tensor.view(torch.int32)) for name, tensor in two.tensors.items())
    )


def test_save_and_load_are_exact(make_set: MakeSet, tmp_path: Path) -> None:
    patches = make_set(["a", "b"], unowned=1)
    folder = store.save(patches, tmp_path / "deep" / "fixes")
    assert folder == tmp_path / "deep" / "fixes"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "patch_config.json",
        "patch_model.safetensors",
    ]
    loaded = store.load(str(folder))
    assert same(patches, loaded) and loaded.name == "fixes"
    assert [path.name for path in folder.parent.iterdir()] == ["fixes"]


def test_names(make_set: MakeSet, tmp_path: Path) -> None:
    store.save(make_set(["a"], name="mine"), tmp_path / "x")
    assert store.load(tmp_path / "x").name == "mine"
    store.save(make_set(["a"]), tmp_path / "y")
    shutil.copytree(tmp_path / "y", tmp_path / "z")
    assert store.load(tmp_path / "z").name == "z"
    assert store.load(store.save(store.load(tmp_path / "z"), tmp_path / "w")).name == "z"


def test_card_says_what_it_is_but_quotes_no_request(make_set: MakeSet, tmp_path: Path) -> None:
    patches = make_set([f"e|{index}" for index in range(60)])
    text = (store.save(patches, tmp_path / "x") / "README.md").read_text(encoding="utf-8")
    assert patches.fingerprint in text and "and 10 more" in text and "60 mpn" in text and "e\\|0" in text
    assert "Claim" not in text


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def tensors(*shape: int) -> st.SearchStrategy[torch.Tensor]:
    size = torch.Size(shape).numel()
    return st.lists(floats, min_size=size, max_size=size).map(
        lambda v: torch.tensor(v, dtype=torch.float32).reshape(shape)
    )


@st.composite
def patch_sets(draw: st.DrawFn) -> PatchSet:
    n, d, rank, out = (draw(st.integers(low, 3)) for low in (0, 1, 0, 1))
    gate = draw(st.sampled_from([None, "ball", "threshold"]))
    gates = {
        "ball": Gate("ball", draw(tensors(2, d)), draw(tensors(2))),
        "threshold": Gate("threshold", threshold=draw(floats)),
    }
    mask = LanguageMask(("en", "zh"), draw(tensors(2, d)), draw(tensors(2, d)))
    activation = draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "identity"]))
    parts: dict[str, Any] = {
        "neurons.0": PatchNeurons(
            "f", draw(tensors(n, d)), draw(tensors(n)), draw(tensors(n, d)), activation, "m", gate
        ),
        "lowrank.0": LowRankDelta("l", draw(tensors(rank, d)), draw(tensors(out, rank))),
        "dense.0": DenseDelta("l", draw(tensors(out, d)), draw(st.none() | tensors(out))),
    }
    text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
    plain = st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | floats | text, lambda x: st.lists(x, max_size=2), max_leaves=3
    )
    record = EditRecord(
        id=draw(text.filter(str.strip)),
        method="mpn",
        status="edited",
        rows={"neurons.0": tuple(range(n)), "dense.0": ()},
        hyperparameters={"x": draw(plain)},
        message=draw(st.none() | text),
        seconds=draw(st.none() | floats),
    )
    return PatchSet(parts, edits=(record,), masks={"m": mask}, gates=gates)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=25)
@given(patches=patch_sets())
def test_any_set_comes_back_bit_for_bit(patches: PatchSet, tmp_path: Path) -> None:
    loaded = store.load(store.save(patches, tmp_path / "fixes"))
    assert same(patches, loaded)
    first = {path.name: path.read_bytes() for path in (tmp_path / "fixes").iterdir()}
    store.save(loaded, tmp_path / "again" / "fixes")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again" / "fixes").iterdir()}


def golden_set() -> PatchSet:
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: PatchSet = module.patch_set()
    return made


def test_golden_folder_of_version_1_loads_and_saves_equal(tmp_path: Path) -> None:
    loaded = store.load(GOLDEN / "v1")
    assert loaded.name == "golden" and same(golden_set(), loaded)
    assert loaded.fingerprint == "e6576856dbe61d465e0d66b23cae006dcf5d047f7be783c03d4be3153f18fd75"
    store.save(loaded, tmp_path / "v1")
    for name in (store.TENSOR_FILE, store.CARD_FILE):
        assert (tmp_path / "v1" / name).read_bytes() == (GOLDEN / "v1" / name).read_bytes()
    old, new = (
        json.loads((folder / "v1" / store.CONFIG_FILE).read_text(encoding="utf-8")) for folder in (GOLDEN, tmp_path)
    )
    assert {**old, "written_by": None} == {**new, "written_by": None} and list(old) == list(new)


def test_missing_folders_and_files(make_set: MakeSet, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere: expected a patch folder, found nothing"):
        store.load(tmp_path / "nowhere")
    folder = store.save(make_set(["a"]), tmp_path / "x")
    with pytest.raises(FormatError, match="expected a patch folder, found a file"):
        store.load(folder / store.CONFIG_FILE)
    for name in (store.TENSOR_FILE, store.CONFIG_FILE):
        (folder / name).unlink()
        with pytest.raises(FormatError, match=rf"{name}: expected a file of a patch folder, found nothing"):
            store.load(folder)


@pytest.mark.parametrize("cut", [0, 4, 8, 60, -1, -40])
def test_truncated_tensor_files(make_set: MakeSet, tmp_path: Path, cut: int) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    file = folder / store.TENSOR_FILE
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(
        FormatError, match=r"patch_model.safetensors: expected a whole safetensors file, .* truncated or corrupted"
    ):
        store.load(folder)


def test_every_damaged_byte_is_noticed(make_set: MakeSet, tmp_path: Path) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    file = folder / store.TENSOR_FILE
    data = file.read_bytes()
    for position in range(0, len(data), 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(FormatError, match=r"patch_model|patch_config"):
            store.load(folder)
    file.write_bytes(data)
    store.load(folder)


def rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    file = folder / store.TENSOR_FILE
    found = safetensors.torch.load_file(file)
    for name, tensor in changed.items():
        found.pop(f"neurons.0.{name}", None)
        if tensor is not None:
            found[f"neurons.0.{name}"] = tensor
    mark = json.loads((folder / store.CONFIG_FILE).read_text(encoding="utf-8"))["fingerprint"]
    safetensors.torch.save_file(found, file, metadata={store.FINGERPRINT_KEY: mark})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"keys": torch.zeros(2, 8)},
            r"tensor 'neurons.0.keys': expected F32 \[1, 8\], found F32 \[2, 8\]",
        ),
        (
            {"keys": torch.zeros(1, 8).half()},
            r"tensor 'neurons.0.keys': expected F32 \[1, 8\], found F16 \[1, 8\]",
        ),
        ({"bias": None}, "tensor 'neurons.0.bias' is missing"),
        ({"more": torch.zeros(1)}, "tensor 'neurons.0.more' is not in the config"),
        ({"bias": torch.tensor([float("inf")])}, "neurons part at 'bert.encoder.layer.1', bias: expected finite"),
        ({"bias": torch.tensor([3.0])}, "patch_config.json: expected fingerprint .* changed after saving"),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    make_set: MakeSet, tmp_path: Path, changed: dict[str, torch.Tensor | None], told: str
) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    rewrite(folder, **changed)
    with pytest.raises(FormatError, match=told):
        store.load(folder)


def test_config_and_tensors_of_two_sets(make_set: MakeSet, tmp_path: Path) -> None:
    one = store.save(make_set(["a"]), tmp_path / "x")
    two = store.save(make_set(["a"], seed=1), tmp_path / "y")
    shutil.copy(two / store.TENSOR_FILE, one / store.TENSOR_FILE)
    with pytest.raises(FormatError, match="the two files belong to different sets"):
        store.load(one)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"REFUTES"', '"SUPPORTS"', "expected fingerprint"),
        ('"keys"', '"kees"', "part 'neurons.0', tensors: expected keys, bias, values, found bias, kees, values"),
        ('"neurons.0": [0]', '"neurons.0": [1]', "row 1: expected a row below 1"),
        ('"format_version": 1', '"format_version": 9', "upgrade"),
    ],
)
def test_configs_changed_by_hand(make_set: MakeSet, tmp_path: Path, old: str, new: str, told: str) -> None:
    file = store.save(make_set(["a"]), tmp_path / "x") / store.CONFIG_FILE
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(FormatError, match=told):
        store.load(tmp_path / "x")


def test_part_without_its_tensors_in_both_files(make_set: MakeSet, tmp_path: Path) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    rewrite(folder, bias=None)
    file = folder / store.CONFIG_FILE
    file.write_text(file.read_text(encoding="utf-8").replace('"bias": [1],', ""), encoding="utf-8")
    with pytest.raises(FormatError, match="part 'neurons.0', tensors: expected keys, bias, values, found keys, values"):
        store.load(folder)
