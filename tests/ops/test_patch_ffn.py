"""patch_ffn against a float64 reference, on every backend this machine can run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from xpatch.errors import MismatchError
from xpatch.ops import ACTIVATIONS, native, patch_ffn, patch_ffn_fired, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

activations = st.sampled_from(list(ACTIVATIONS))
dtypes = st.sampled_from(list(TOLERANCE))
sizes = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 47, 64, 100, 129])
counts = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 31, 32, 33, 65, 150])


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "native" and not native.available():
        pytest.fail(f"the native build is missing: {native.info()['error']}")
    monkeypatch.setenv("XPATCH_BACKEND", request.param)
    native.reset()
    yield
    monkeypatch.undo()
    native.reset()


both_backends = pytest.mark.usefixtures("backend")


def draw(M, D, N, V, dtype=torch.float32, device="cpu", generator=None):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return randn(M, D), randn(N, D) / max(D, 1) ** 0.5, randn(N), randn(N, V)


def in_float64(x, keys, bias, values, activation):
    return reference.patch_ffn(*(t.double() for t in (x, keys, bias, values)), activation)


def assert_close(found, tensors, activation):
    x, _, _, values = tensors
    expected = in_float64(*tensors, activation)
    assert found.dtype == x.dtype and found.device == x.device
    assert found.shape == (*x.shape[:-1], values.shape[1])
    # Errors grow with what is added up, not with what is left after cancellation.
    scores = in_float64(*tensors[:3], torch.eye(values.shape[0], dtype=values.dtype, device=x.device), activation)
    scale = 1 + scores.abs() @ values.double().abs()
    assert ((found.double() - expected).abs() <= TOLERANCE[x.dtype] * scale * (1 + x.shape[-1] ** 0.5)).all()


@both_backends
@pytest.mark.parametrize("device", DEVICES)
@given(M=counts, D=sizes, N=counts, V=sizes, dtype=dtypes, activation=activations, seed=st.integers(0, 2**32))
def test_matches_float64(device, M, D, N, V, dtype, activation, seed):
    tensors = draw(M, D, N, V, dtype, device, torch.Generator().manual_seed(seed))
    assert_close(patch_ffn(*tensors, activation), tensors, activation)


@both_backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_several_panels_and_chunks(activation, dtype):
    tensors = draw(300, 40, 1100, 200, dtype)
    assert_close(patch_ffn(*tensors, activation), tensors, activation)


@both_backends
@given(layout=st.tuples(*[st.sampled_from(["sliced", "transposed", "misaligned", "expanded"])] * 3), dtype=dtypes)
def test_any_memory_layout(layout, dtype):
    def laid_out(kind, rows, width):
        if kind == "sliced":
            return torch.randn(rows, width + 5).to(dtype)[:, 2 : width + 2]
        if kind == "transposed":
            return torch.randn(width, rows).to(dtype).t()
        if kind == "misaligned":
            return torch.randn(rows * width + 1).to(dtype)[1:].view(rows, width)
        return torch.randn(1, width).to(dtype).expand(rows, width)

    x, keys, values = laid_out(layout[0], 9, 21), laid_out(layout[1], 13, 21), laid_out(layout[2], 13, 19)
    bias = torch.randn(26).to(dtype)[::2]
    before = [t.clone() for t in (x, keys, bias, values)]
    found = patch_ffn(x, keys, bias, values, "gelu")
    assert_close(found, (x, keys, bias, values), "gelu")
    assert found.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, keys, bias, values), strict=True))


@both_backends
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 4)])
def test_leading_axes(leading):
    _, keys, bias, values = draw(1, 8, 5, 6)
    x = torch.randn(*leading, 8)
    assert_close(patch_ffn(x, keys, bias, values, "silu"), (x, keys, bias, values), "silu")


@both_backends
@pytest.mark.parametrize("N", [0, 1])
@pytest.mark.parametrize("M", [0, 1])
def test_no_neurons_add_exactly_nothing(M, N):
    tensors = draw(M, 4, N, 3)
    found = patch_ffn(*tensors, "relu")
    assert found.shape == (M, 3)
    if N == 0:
        assert torch.equal(found, torch.zeros(M, 3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate_as_in_dense_torch(activation, dtype, bad):
    x, keys, bias, values = draw(37, 23, 40, 19, dtype)
    x[3, 5] = bad
    x[36, 22] = bad
    bias[7] = bad
    found = patch_ffn(x, keys, bias, values, activation)
    z = F.linear(x, keys, bias)
    # torch's vectorised gelu(inf) is NaN on some machines and inf on others; z ndtr(z) is the formula itself.
    h = z * torch.special.ndtr(z) if activation == "gelu" else reference.activate(z, activation)
    expected = h @ values
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[found.isinf()], expected[expected.isinf()])


@given(M=st.integers(1, 40), D=sizes, N=st.integers(1, 70), V=sizes, dtype=dtypes, activation=activations)
def test_bit_identical_for_any_thread_count(M, D, N, V, dtype, activation):
    # Small problems run on one thread; repeat the rows until several are used.
    x, keys, bias, values = draw(M, D, N, V, dtype)
    x = x.repeat(1 + 2**18 // (M * N * (D + V)), 1)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(patch_ffn(x, keys, bias, values, activation))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_does_not_depend_on_its_batch():
    x, keys, bias, values = draw(70, 50, 90, 70)
    for activation in ACTIVATIONS:
        whole = patch_ffn(x, keys, bias, values, activation)
        for m in (0, 1, 33, 69):
            assert torch.equal(patch_ffn(x[m : m + 1], keys, bias, values, activation), whole[m : m + 1])


@both_backends
@pytest.mark.parametrize("device", DEVICES)
@given(M=counts, D=sizes, N=counts, V=sizes, dtype=dtypes, activation=activations, seed=st.integers(0, 2**32))
def test_which_neurons_fired(device, M, D, N, V, dtype, activation, seed):
    x, keys, bias, values = draw(M, D, N, V, dtype, device, torch.Generator().manual_seed(seed))
    out, fired = patch_ffn_fired(x, keys, bias, values, activation)
    assert torch.equal(out, patch_ffn(x, keys, bias, values, activation))
    assert fired.shape == (M, N) and fired.dtype == torch.bool and fired.is_contiguous()
    scores = F.linear(x.double(), keys.double(), bias.double())
    clear = scores.abs() > TOLERANCE[dtype] * (1 + F.linear(x.double().abs(), keys.double().abs()))
    assert torch.equal(fired[clear], scores[clear] > 0)


@both_backends
def test_fired_over_several_panels_and_chunks_and_leading_axes():
    x, keys, bias, values = draw(300, 40, 1100, 7)
    out, fired = patch_ffn_fired(x.reshape(3, 100, 40), keys, bias, values, "relu")
    assert fired.shape == (3, 100, 1100) and out.shape == (3, 100, 7)
    scores = F.linear(x.double(), keys.double(), bias.double()).reshape(3, 100, 1100)
    clear = scores.abs() > 1e-4
    assert torch.equal(fired[clear], scores[clear] > 0)


@both_backends
def test_fired_without_output_columns_and_with_nan():
    x, keys, bias, values = draw(5, 8, 6, 0)
    bias[2] = float("nan")
    out, fired = patch_ffn_fired(x, keys, bias, values, "relu")
    assert out.shape == (5, 0) and not fired[:, 2].any()
    assert torch.equal(fired[:, [0, 1]], F.linear(x, keys, bias)[:, [0, 1]] > 0)


@both_backends
def test_aliases():
    tensors = draw(4, 5, 6, 7)
    assert torch.equal(patch_ffn(*tensors, "gelu_new"), patch_ffn(*tensors, "gelu_tanh"))
    assert torch.equal(patch_ffn(*tensors, "swish"), patch_ffn(*tensors, "silu"))


@both_backends
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, k, b, v: (x[:, :4], k, b, v), "width of x and keys"),
        (lambda x, k, b, v: (x, k, b[:2], v), "same number of neurons"),
        (lambda x, k, b, v: (x, k, b, v[:2]), "same number of neurons"),
        (lambda x, k, b, v: (x, k[0], b, v), "keys \\[N, D\\]"),
        (lambda x, k, b, v: (x.half(), k, b, v), "one floating dtype"),
        (lambda x, k, b, v: tuple(t.long() for t in (x, k, b, v)), "one floating dtype"),
        (lambda x, k, b, v: (x, k.to("meta"), b, v), "one device"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(MismatchError, match=words):
        patch_ffn(*change(*draw(3, 5, 6, 7)), "relu")


@both_backends
def test_unknown_activation_is_refused():
    with pytest.raises(MismatchError, match="unknown activation 'tanh'; known: relu"):
        patch_ffn(*draw(3, 5, 6, 7), "tanh")
