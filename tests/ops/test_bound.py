"""BoundPatchFfn: patch_ffn and patch_ffn_fired to the bit, whatever it is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpatch.errors import BackendError, MismatchError
from xpatch.ops import BoundPatchFfn, native, pack_keys, patch_ffn, patch_ffn_fired

ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu", "identity"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def draw(M, D, N, V, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, keys, bias, values = (torch.randn(s, generator=generator) for s in ((M, D), (N, D), (N,), (N, V)))
    return tuple(t.to(dtype) for t in (x, keys / max(D, 1) ** 0.5, bias - 2, values))


def assert_the_same(bound, x, *neurons):
    expected, pairs = patch_ffn_fired(x, *neurons)
    found, fired = bound.fired(x)
    assert torch.equal(patch_ffn(x, *neurons), expected)
    for out in (bound(x), found):
        assert torch.equal(out, expected) and out.dtype == x.dtype and out.is_contiguous()
    assert torch.equal(fired, pairs)


@settings(max_examples=60)
@given(
    M=st.integers(0, 20), D=st.integers(0, 80), N=st.integers(0, 70), V=st.integers(0, 40), seed=st.integers(0, 2**32),
    activation=st.sampled_from(ACTIVATIONS), dtype=st.sampled_from(DTYPES), square=st.booleans(), packing=st.booleans(),
)  # fmt: skip
def test_the_bits_of_the_operator(M, D, N, V, seed, activation, dtype, square, packing):
    x, keys, bias, values = draw(M, D, N, D if square else V, dtype, seed)
    packed = pack_keys(keys, bias, activation) if packing else None
    assert_the_same(BoundPatchFfn(keys, bias, values, activation, packed), x, keys, bias, values, activation, packed)


@pytest.fixture
def neurons():
    _, keys, bias, values = draw(0, 24, 50, 24)
    return keys, bias, values, "relu", pack_keys(keys, bias, "relu")


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3)])
def test_leading_axes_and_layouts(neurons, lead):
    bound, x = BoundPatchFfn(*neurons), torch.randn(*lead, 24)
    assert_the_same(bound, x, *neurons)
    assert_the_same(bound, torch.randn(*lead, 48)[..., ::2], *neurons)
    assert_the_same(bound, torch.randn(24, *lead).movedim(0, -1), *neurons)


def test_strided_neurons(neurons):
    keys, bias, values, activation, packed = neurons
    wide = torch.randn(50, 30)
    wide[:, 3:27] = keys
    strided = (wide[:, 3:27], bias.repeat_interleave(2)[::2], values.t().contiguous().t(), activation, packed)
    assert_the_same(BoundPatchFfn(*strided), torch.randn(9, 24), *neurons)


def test_where_everything_fires_the_frameworks_matmuls_run():
    x, keys, bias, values = draw(64, 64, 2000, 64)
    bias += 100
    packed = pack_keys(keys, bias, "relu")
    assert_the_same(BoundPatchFfn(keys, bias, values, "relu", packed), x, keys, bias, values, "relu", packed)


def test_gradients_transforms_and_meta_tensors(neurons):
    bound, x = BoundPatchFfn(*neurons), torch.randn(5, 24)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    bound(one).square().sum().backward()
    patch_ffn(two, *neurons).square().sum().backward()
    assert torch.equal(one.grad, two.grad)
    torch.testing.assert_close(torch.func.vmap(bound)(x), bound(x))
    torch.testing.assert_close(
        torch.func.jvp(bound, (x,), (x,)), torch.func.jvp(lambda r: patch_ffn(r, *neurons), (x,), (x,))
    )
    trained = BoundPatchFfn(neurons[0].clone().requires_grad_(), *neurons[1:])
    assert trained(x).requires_grad
    assert bound(x).grad_fn is None
    bare = BoundPatchFfn(*(t.to("meta") for t in neurons[:3]), "relu")
    assert bare(x.to("meta")).device.type == "meta"


def test_compiles_as_one_graph(neurons):
    bound = BoundPatchFfn(*neurons)
    compiled = torch.compile(lambda x: bound(x) + 1, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (2, 3):
        x = torch.randn(count, 24)
        assert torch.equal(compiled(x), bound(x) + 1)


def test_what_does_not_fit_is_refused(neurons):
    keys, bias, values, activation, _ = neurons
    with pytest.raises(MismatchError, match=r"width of x and keys to be equal"):
        BoundPatchFfn(*neurons)(torch.randn(3, 25))
    with pytest.raises(MismatchError, match="one floating dtype"):
        BoundPatchFfn(*neurons)(torch.randn(3, 24).half())
    with pytest.raises(MismatchError, match="same number of neurons"):
        BoundPatchFfn(keys, bias[1:], values, activation)
    with pytest.raises(MismatchError, match=r"keys \[N, D\]"):
        BoundPatchFfn(torch.tensor(1.0), bias, values, activation)
    with pytest.raises(BackendError, match="packed keys"):
        BoundPatchFfn(keys[1:], bias[1:], values[1:], activation, pack_keys(keys, bias, activation))(keys)
    with pytest.raises(MismatchError, match="unknown activation"):
        BoundPatchFfn(keys, bias, values, "tanh")


@pytest.mark.skipif(native.backend_for("cpu", torch.float32) != "native", reason="needs the native build")
def test_the_operator_is_passed_by(neurons, monkeypatch):
    """What makes it worth having: on plain tensors neither the operator nor its checks run."""
    from xpatch.ops import bound as module

    bound = BoundPatchFfn(*neurons)
    for name in ("patch_ffn", "patch_ffn_fired", "_check"):
        monkeypatch.setattr(module, name, None)
    bound(torch.randn(3, 24)), bound.fired(torch.randn(3, 24))
