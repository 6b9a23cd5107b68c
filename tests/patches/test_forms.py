"""What the five forms accept, freeze and refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from xpatch.errors import FormatError
from xpatch.patches.types import DenseDelta, Gate, LanguageMask, LowRankDelta, PatchNeurons


def neurons(**changes: object) -> PatchNeurons:
    fields = {"keys": torch.ones(2, 3), "bias": torch.zeros(2), "values": torch.ones(2, 3), "activation": "relu"}
    return PatchNeurons(**{"site": "layer.0", **fields, **changes})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_private_fp32_copies(dtype: torch.dtype) -> None:
    given = torch.arange(6, dtype=dtype).reshape(3, 2).T.requires_grad_()
    part = neurons(keys=given)
    with torch.no_grad():
        given[0, 0] = 9
    assert part.keys.dtype == torch.float32 and part.keys.is_contiguous() and not part.keys.requires_grad
    assert part.keys.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_values_made_while_serving_can_be_trained_on() -> None:
    with torch.inference_mode():
        part = neurons(keys=torch.ones(2, 3))
    assert not part.keys.is_inference()


def test_zero_rows_are_a_patch_too() -> None:
    part = neurons(keys=torch.ones(0, 3), bias=torch.ones(0), values=torch.ones(0, 3))
    assert part.count == 0 and part.nbytes == 0 and part.widths == (3, 3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keys": torch.ones(2)}, r"keys: expected shape \[N, D\], found \[2\]"),
        ({"bias": torch.ones(3)}, r"bias: expected shape \[N\] with N=2, found \[3\]"),
        ({"values": torch.ones(2, 4)}, r"values: expected shape \[N, D\] with N=2, D=3, found \[2, 4\]"),
        ({"keys": [[1.0, 2.0, 3.0]] * 2}, "keys: expected a torch tensor .* found list"),
        ({"keys": torch.ones(2, 3, dtype=torch.long)}, "keys: expected a floating-point tensor .* found torch.int64"),
        ({"keys": torch.ones(2, 3, device="meta")}, "keys: expected a dense tensor with data"),
        ({"values": torch.tensor([[1, 2, 3], [4, float("nan"), 6]])}, r"values: .* found nan at \[1, 1\]"),
        (
            {"values": torch.full((2, 3), 1e300, dtype=torch.float64)},
            r"values: expected finite fp32 numbers, found inf",
        ),
        ({"activation": "swish"}, "layer.0', activation: expected one of relu, gelu, .* found 'swish'"),
        ({"site": ""}, "site: expected a non-empty string, found ''"),
        ({"gate": ""}, "gate: expected a non-empty string"),
        ({"mask": 3}, "mask: expected a non-empty string, found 3"),
    ],
)
def test_bad_neurons_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(FormatError, match=told):
        neurons(**changes)


def test_deltas() -> None:
    lowrank = LowRankDelta("linear", torch.ones(2, 5), torch.ones(3, 2))
    assert (lowrank.count, lowrank.widths) == (2, (5, 3))
    dense = DenseDelta("linear", torch.ones(3, 5))
    assert (dense.count, dense.widths, list(dense.tensors)) == (0, (5, 3), ["weight"])
    with pytest.raises(FormatError, match=r"up: expected shape \[D_out, R\] with R=2"):
        LowRankDelta("linear", torch.ones(2, 5), torch.ones(2, 3))
    with pytest.raises(FormatError, match=r"bias: expected shape \[D_out\] with D_out=3"):
        DenseDelta("linear", torch.ones(3, 5), torch.ones(5))


def test_masks() -> None:
    assert LanguageMask(["en", "de"], torch.ones(2, 3), torch.ones(2, 4)).languages == ("en", "de")
    for languages, told in (
        (("en", "en"), "each language once"),
        ((), "one language code or more"),
        ("en", "one language code"),
    ):
        with pytest.raises(FormatError, match=told):
            LanguageMask(languages, torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(FormatError, match=r"outer: expected shape \[L, D_out\] with L=2"):
        LanguageMask(("en", "de"), torch.ones(2, 3), torch.ones(1, 3))


def test_gates() -> None:
    assert Gate("threshold", threshold=1).threshold == 1.0
    assert Gate("ball", torch.ones(2, 3), torch.ones(2)).tensors.keys() == {"keys", "radii"}
    for wrong, told in (
        ({"kind": "box"}, "gate, kind: expected one of ball, threshold, found 'box'"),
        ({"kind": "ball", "keys": torch.ones(1, 2)}, "expected keys and radii, no threshold, found keys"),
        ({"kind": "threshold"}, "expected a threshold, no keys or radii, found none"),
        ({"kind": "threshold", "threshold": float("inf")}, "threshold: expected a finite number"),
        ({"kind": "ball", "keys": torch.ones(1, 2), "radii": torch.ones(2)}, "radii: expected shape"),
    ):
        with pytest.raises(FormatError, match=told):
            Gate(**wrong)


def test_copies_are_the_value_and_it_travels() -> None:
    part = neurons()
    assert copy.copy(part) is part and copy.deepcopy({"a": part})["a"] is part
    assert torch.equal(pickle.loads(pickle.dumps(part)).keys, part.keys)
    with pytest.raises(AttributeError):
        part.keys = torch.zeros(2, 3)
