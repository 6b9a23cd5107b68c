"""pack_keys and what goes with it: the bytes, their refusal where they do not belong, the early exit, the counts."""

from __future__ import annotations

import math

import pytest
import torch

from xpatch.errors import BackendError, MismatchError
from xpatch.ops import pack_keys, patch_ffn, patch_ffn_fired, reference, screening_stats
from xpatch.ops.registry.patch_ffn import native_call

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(M, D, N, V, offset=-2.0, dtype=torch.float32):
    x, keys, bias, values = (torch.randn(s) for s in ((M, D), (N, D), (N,), (N, V)))
    return tuple(t.to(dtype) for t in (x, keys / D**0.5, bias + offset, values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "D"), [(1, 1), (16, 4), (17, 5), (1000, 768)])
def test_the_bytes_are_about_one_for_each_coordinate(N, D, dtype):
    _, keys, bias, _ = draw(0, D, N, 0, dtype=dtype)
    packed = pack_keys(keys, bias, "relu")
    assert packed.dtype == torch.uint8 and packed.ndim == 1 and packed.device.type == "cpu"
    groups = -(-N // 16)
    assert packed.numel() <= 128 + groups * 16 * (-(-D // 4) * 4 + 16)
    assert torch.equal(packed, pack_keys(keys, bias, "relu"))


def test_the_bytes_do_not_depend_on_threads_or_gradients():
    _, keys, bias, _ = draw(0, 200, 2500, 0)
    torch.set_num_threads(1)
    expected = pack_keys(keys, bias, "gelu")
    torch.set_num_threads(5)
    keys.requires_grad_()
    found = pack_keys(keys, bias, "gelu")
    assert torch.equal(found, expected) and not found.requires_grad
    with torch.inference_mode():
        assert not pack_keys(keys, bias, "gelu").is_inference()


def test_none_where_screening_cannot_help():
    _, keys, bias, _ = draw(0, 8, 20, 0)
    assert pack_keys(keys, bias, "identity") is None
    assert pack_keys(keys[:0], bias[:0], "relu") is None
    assert pack_keys(keys[:, :0], bias, "relu") is None
    assert pack_keys(keys.double(), bias.double(), "relu") is None
    assert pack_keys(keys.to("meta"), bias.to("meta"), "relu") is None
    assert pack_keys(torch.zeros(2, 32769), bias[:2], "relu") is None
    assert pack_keys(torch.zeros(2, 32768), bias[:2], "relu") is not None


def test_aliases_are_packed_as_what_they_stand_for():
    _, keys, bias, _ = draw(0, 8, 20, 0)
    assert torch.equal(pack_keys(keys, bias, "gelu_new"), pack_keys(keys, bias, "gelu_tanh"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k, b: (k[0], b, "relu"), r"expected keys \[N, D\] and bias \[N\]; found keys \(8,\)"),
        (lambda k, b: (k, b[:3], "relu"), r"expected keys \[N, D\] and bias \[N\]; found .* bias \(3,\)"),
        (lambda k, b: (k, b[:, None], "relu"), r"expected keys \[N, D\] and bias \[N\]"),
        (lambda k, b: (k, b.half(), "relu"), "expected one dtype and one device; found .* torch.float16"),
        (lambda k, b: (k, b.to("meta"), "relu"), "expected one dtype and one device; found .* meta"),
        (lambda k, b: (k, b, "tanh"), "unknown activation 'tanh'"),
    ],
)
def test_keys_and_biases_that_do_not_fit_are_refused(change, words):
    _, keys, bias, _ = draw(0, 8, 20, 0)
    with pytest.raises(MismatchError, match=words):
        pack_keys(*change(keys, bias))


def test_packed_keys_of_other_keys_are_refused():
    x, keys, bias, values = draw(3, 8, 20, 4)
    packed = pack_keys(keys, bias, "relu")
    for arguments, words in [
        ((x, keys[:19], bias[:19], values[:19], "relu", packed), "expected N=19 D=8 activation code 0; found N=20 D=8"),
        ((x[:, :7], keys[:, :7], bias, values, "relu", packed), "expected N=20 D=7 .*; found N=20 D=8"),
        ((x, keys, bias, values, "gelu", packed), "activation code 1; found .* activation code 0.*; pack the keys that are served"),
        ((x, keys, bias, values, "identity", packed), "cannot be screened: D=8, activation code 4"),
        ((x, keys, bias, values, "relu", packed[:-1]), f"expected {packed.numel()} bytes, found {packed.numel() - 1}"),
        ((x, keys, bias, values, "relu", packed[:40]), "expected at least 64 bytes, found 40"),
        ((x, keys, bias, values, "relu", packed.flip(0)), "not written by pack_keys"),
    ]:  # fmt: skip
        for op in (patch_ffn, patch_ffn_fired):
            with pytest.raises(BackendError, match=words):
                op(*arguments)


@pytest.mark.parametrize("M", [1, 2, 8, 9, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_everything_fires_dense_matmuls_run(M, dtype):
    """Adversarial: the sample sees it at once, and the result is the framework's own."""
    N = -(-(2**22) // (M * 46))  # smaller calls never give up
    arguments = (*draw(M, 40, N, 6, 20, dtype), "relu")
    packed = pack_keys(*arguments[1:3], "relu")
    assert native_call(*arguments, packed)[1][0]
    assert torch.equal(patch_ffn(*arguments, packed), reference.patch_ffn(*arguments))
    found, expected = patch_ffn_fired(*arguments, packed), reference.patch_ffn_fired(*arguments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert len(found[1]) == M * N


def test_small_calls_never_give_up():
    """A row's bits then depend on nothing beside it."""
    arguments = (*draw(9, 40, 500, 6, 20), "relu")
    packed = pack_keys(*arguments[1:3], "relu")
    whole = patch_ffn(*arguments, packed)
    assert not native_call(*arguments, packed)[1][0]
    assert torch.equal(patch_ffn(arguments[0][3:4], *arguments[1:], packed), whole[3:4])


def test_what_the_sample_does_not_see_stops_the_call_at_its_limit():
    x, keys, bias, values = draw(70, 40, 1536, 6, 20)
    bias.view(-1, 128)[:, :16] -= 1000  # every eighth group of 16, which are those sampled
    arguments = (x, keys, bias, values, "relu", pack_keys(keys, bias, "relu"))
    assert native_call(*arguments)[1][0]
    assert torch.equal(patch_ffn(*arguments), reference.patch_ffn(*arguments[:5]))


def test_giving_up_is_the_same_for_any_thread_count():
    for offset in (-4.0, -2.0, -1.5, -1.0, -0.5, 0.0):
        arguments = draw(200, 40, 1600, 6, offset)
        packed = pack_keys(*arguments[1:3], "relu")
        found = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(native_call(*arguments, "relu", packed)[1][0])
        assert len(set(found)) == 1


def test_screening_stats():
    x, keys, bias, values = draw(240, 64, 300, 1, -3)
    packed = pack_keys(keys, bias, "relu")
    found = screening_stats(x, keys, bias, packed, "relu")
    _, fired = reference.patch_ffn_fired(x, keys, bias, values, "relu")
    assert found == {
        "pairs": 72000,
        "survivors": found["survivors"],
        "fired": len(fired),
        "coarse": False,
        "dense": False,
    }
    assert len(fired) <= found["survivors"] <= 2 * len(fired) + 20
    bias += 30
    found = screening_stats(x, keys, bias, pack_keys(keys, bias, "relu"), "relu")
    assert found == {"pairs": 72000, "survivors": 72000, "fired": 72000, "coarse": False, "dense": True}
    assert screening_stats(x[:0], keys, bias, packed, "relu")["pairs"] == 0


def test_stats_say_dense_where_the_operator_itself_gives_up():
    """Near the size below which a call never does: values are as wide as keys there."""
    for N in (40_000, 60_000):
        x, keys, bias, values = draw(1, 40, N, 40, 20)
        packed = pack_keys(keys, bias, "relu")
        gave_up = native_call(x, keys, bias, values, "relu", packed)[1][0]
        assert screening_stats(x, keys, bias, packed, "relu")["dense"] is gave_up is (N == 60_000)


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e30, math.nan])
def test_keys_without_leading_directions_are_packed_all_the_same(fill):
    """All alike, so that they span one direction or none, or too long for a basis."""
    keys, bias, values, x = (
        torch.full((4200, 96), fill),
        torch.full((4200,), -1.0),
        torch.randn(4200, 5),
        torch.randn(3, 96),
    )
    packed = pack_keys(keys, bias, "relu")
    found, expected = (
        patch_ffn(x, keys, bias, values, "relu", packed),
        reference.patch_ffn(x, keys, bias, values, "relu"),
    )
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-3, atol=1e-2)


def test_stats_count_no_lanes_beyond_the_neurons():
    """A row of NaN keeps all neurons, and no more than there are."""
    x, keys, bias, _ = draw(2, 8, 17, 1)
    x[:] = math.nan
    found = screening_stats(x, keys, bias, pack_keys(keys, bias, "relu"), "relu")
    assert found["pairs"] == found["survivors"] == 34 and found["fired"] == 0


def test_stats_of_leading_axes_are_those_of_the_rows():
    x, keys, bias, _ = draw(20, 64, 300, 1, -3)
    packed = pack_keys(keys, bias, "relu")
    assert screening_stats(x.view(4, 5, 64), keys, bias, packed, "relu") == screening_stats(
        x, keys, bias, packed, "relu"
    )


def test_stats_where_the_kernel_cannot_see_are_refused():
    x, keys, bias, _ = draw(2, 8, 20, 1)
    packed = pack_keys(keys, bias, "relu")
    with pytest.raises(MismatchError, match="screening_stats: expected CPU tensors"):
        screening_stats(x.double(), keys.double(), bias.double(), packed, "relu")
    with pytest.raises(MismatchError, match="width of x and keys"):
        screening_stats(x[:, :7], keys, bias, packed, "relu")
