"""patch_ffn against a float64 reference: packed keys and plain ones, on every backend this machine can run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpatch.errors import MismatchError
from xpatch.ops import ACTIVATIONS, pack_keys, patch_ffn, patch_ffn_fired, reference
from xpatch.ops.registry.patch_ffn import native_call

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SCREENED = [name for name in ACTIVATIONS if name != "identity"]

activations = st.sampled_from(list(ACTIVATIONS))
screened = st.sampled_from(SCREENED)
dtypes = st.sampled_from(list(TOLERANCE))
sizes = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 47, 64, 100, 129])
counts = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 31, 32, 33, 65, 150])
offsets = st.sampled_from([-6.0, -2.0, 0.0])  # few neurons fire, or half of them: dense matmuls then
both_backends = pytest.mark.usefixtures("backend")
given_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw(M, D, N, V, dtype=torch.float32, device="cpu", generator=None, offset=0.0):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = randn(M, D), randn(N, D) / max(D, 1) ** 0.5, randn(N) + offset, randn(N, V)
    return tuple(t.to(device, dtype) for t in tensors)


def draw_masks(L, D, V, dtype=torch.float32, lead=()):
    inner, outer = torch.rand(L, D).to(dtype), torch.rand(L, V).round().to(dtype)
    return inner, outer, torch.randint(L, lead)


def packed_for(tensors, activation):
    return pack_keys(tensors[1], tensors[2], activation)


def screen(tensors, activation, masks=(None, None, None), **more):
    """The native kernel itself, which never gives way to dense matmuls here."""
    return native_call(*tensors, activation, packed_for(tensors, activation), masks, always=True, **more)[0]


def in_float64(tensors, activation, masks=(None, None, None)):
    masks = [t if t is None or t.dtype == torch.int64 else t.double() for t in masks]
    return reference.patch_ffn(*(t.double() for t in tensors), activation, *masks)


def assert_close(found, tensors, activation, masks=(None, None, None)):
    x, _, _, values = tensors
    expected = in_float64(tensors, activation, masks)
    assert found.dtype == x.dtype and found.device == x.device and found.is_contiguous()
    assert found.shape == (*x.shape[:-1], values.shape[1])
    # Errors grow with what is added up, not with what is left after cancellation.
    eye = torch.eye(values.shape[0], dtype=torch.float64, device=x.device)
    scale = 1 + in_float64((*tensors[:3], eye), activation, (masks[0], None, masks[2])).abs() @ values.double().abs()
    assert ((found.double() - expected).abs() <= TOLERANCE[x.dtype] * scale * (1 + x.shape[-1] ** 0.5)).all()


# --- Values ----------------------------------------------------------------------------------------------------------


@both_backends
@given_fixtures
@given(
    M=counts,
    D=sizes,
    N=counts,
    V=sizes,
    dtype=dtypes,
    activation=activations,
    offset=offsets,
    seed=st.integers(0, 2**32),
)
def test_matches_float64(device, M, D, N, V, dtype, activation, offset, seed):
    tensors = draw(M, D, N, V, dtype, device, torch.Generator().manual_seed(seed), offset)
    assert_close(patch_ffn(*tensors, activation), tensors, activation)
    assert_close(patch_ffn(*tensors, activation, packed_for(tensors, activation)), tensors, activation)


@given(
    M=counts,
    D=sizes,
    N=counts.filter(bool),
    V=sizes,
    dtype=dtypes,
    activation=screened,
    offset=offsets,
    seed=st.integers(0, 2**32),
)
def test_the_kernel_alone_matches_float64(M, D, N, V, dtype, activation, offset, seed):
    tensors = draw(M, D, N, V, dtype, "cpu", torch.Generator().manual_seed(seed), offset)
    assert_close(screen(tensors, activation), tensors, activation)


@both_backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_several_panels_and_blocks(activation, dtype):
    tensors = draw(300, 40, 1100, 200, dtype, offset=-4)
    assert_close(patch_ffn(*tensors, activation, packed_for(tensors, activation)), tensors, activation)


def test_more_rows_than_one_panel():
    tensors = draw(4100, 16, 40, 5, offset=-3)
    assert_close(screen(tensors, "relu"), tensors, "relu")


@both_backends
@pytest.mark.parametrize("packing", [True, False])
@given_fixtures
@given(layout=st.tuples(*[st.sampled_from(["sliced", "transposed", "misaligned", "expanded"])] * 3), dtype=dtypes)
def test_any_memory_layout(packing, laid_out, layout, dtype):
    x, keys = laid_out(layout[0], 9, 21, dtype), laid_out(layout[1], 13, 21, dtype)
    values, bias = laid_out(layout[2], 13, 19, dtype), (torch.randn(26) - 6).to(dtype)[::2]
    tensors = (x, keys, bias, values)
    before = [t.clone() for t in tensors]
    assert_close(patch_ffn(*tensors, "gelu", packed_for(tensors, "gelu") if packing else None), tensors, "gelu")
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@both_backends
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 4)])
def test_leading_axes(leading, packing):
    tensors = (torch.randn(*leading, 8), *draw(1, 8, 5, 6, offset=-2)[1:])
    assert_close(patch_ffn(*tensors, "silu", packed_for(tensors, "silu") if packing else None), tensors, "silu")


@both_backends
@pytest.mark.parametrize("N", [0, 1])
@pytest.mark.parametrize("M", [0, 1])
def test_no_neurons_add_exactly_nothing(M, N):
    tensors = draw(M, 4, N, 3)
    found = patch_ffn(*tensors, "relu", packed_for(tensors, "relu"))
    assert found.shape == (M, 3)
    if N == 0:
        assert torch.equal(found, torch.zeros(M, 3))


@both_backends
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lead", [(12,), (4,)], ids=["per row", "per item"])
@pytest.mark.parametrize("which", ["both", "inner", "outer", "neither"])
def test_language_masks(which, lead, packing, dtype):
    tensors = (
        torch.randn(*lead, *([] if lead == (12,) else [3]), 20).to(dtype),
        *draw(1, 20, 50, 9, dtype, offset=-3)[1:],
    )
    inner, outer, language = draw_masks(3, 20, 9, dtype, lead)
    masks = (inner if which in ("both", "inner") else None, outer if which in ("both", "outer") else None, language)
    packed = packed_for(tensors, "relu") if packing else None
    found = patch_ffn(*tensors, "relu", packed, *masks)
    assert_close(found, tensors, "relu", masks)
    if which == "neither":
        assert torch.equal(found, patch_ffn(*tensors, "relu", packed))


@both_backends
@pytest.mark.parametrize("packing", [True, False])
def test_a_language_that_the_masks_lack_is_refused(packing):
    tensors = draw(3, 20, 50, 9, offset=-3)
    inner, outer, _ = draw_masks(2, 20, 9)
    for wrong in (2, -3):
        with pytest.raises(MismatchError, match=rf"language in \[0, L = 2\); found {wrong}"):
            patch_ffn(
                *tensors,
                "relu",
                packed_for(tensors, "relu") if packing else None,
                inner,
                outer,
                torch.tensor([0, wrong, 1]),
            )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("activation", SCREENED)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate_as_in_dense_torch(activation, dtype, bad, packing):
    x, keys, bias, values = tensors = draw(37, 23, 200, 19, dtype, offset=-3)
    x[3, 5] = bad
    x[36, 22] = bad
    bias[7] = bad
    found = screen(tensors, activation) if packing else patch_ffn(*tensors, activation)
    if packing:  # some machines' 16-bit matmuls make NaN of inf
        x, keys, bias, values = (tensor.double() for tensor in tensors)
    z = F.linear(x, keys, bias)
    # torch's vectorised gelu(inf) is NaN on some machines and inf on others; z ndtr(z) is the formula itself.
    h = z * torch.special.ndtr(z) if activation == "gelu" and packing else reference.activate(z, activation)
    expected = h @ values
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[found.isinf()], expected[expected.isinf()].to(dtype))


# --- Bits ------------------------------------------------------------------------------------------------------------


@given(M=st.integers(1, 40), D=sizes, N=st.integers(1, 70), V=sizes, dtype=dtypes, activation=screened, offset=offsets)
def test_bit_identical_for_any_thread_count(M, D, N, V, dtype, activation, offset):
    # Small problems run on one thread; repeat the rows until several are used.
    x, *others = draw(M, D, N, V, dtype, offset=offset)
    tensors = (x.repeat(1 + 2**20 // (M * N * D), 1), *others)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(screen(tensors, activation))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", SCREENED)
def test_a_row_does_not_depend_on_its_batch(activation, dtype, masked):
    x, *others = tensors = draw(210, 50, 90, 300, dtype, offset=-2)
    inner, outer, language = draw_masks(3, 50, 300, dtype, (210,)) if masked else (None, None, None)
    whole = screen(tensors, activation, (inner, outer, language))
    for rows in (slice(0, 1), slice(33, 34), slice(209, 210), slice(5, 12), slice(90, 110)):
        masks = (inner, outer, None if language is None else language[rows])
        assert torch.equal(screen((x[rows], *others), activation, masks), whole[rows])


# --- What fired ------------------------------------------------------------------------------------------------------


def assert_fired(found, scores, clear):
    """found `[K, 2]` int64 in ascending order are the pairs with scores `[M, N]` above zero, where that is clear."""
    assert found.dtype == torch.int64 and found.ndim == 2 and found.shape[1] == 2 and found.is_contiguous()
    where = torch.zeros(scores.shape, dtype=torch.bool)
    where[found[:, 0], found[:, 1]] = True
    assert torch.equal(where.nonzero(), found)
    assert torch.equal(where[clear], (scores > 0)[clear])


@both_backends
@given(
    M=counts,
    D=sizes,
    N=counts,
    V=sizes,
    dtype=dtypes,
    activation=activations,
    offset=offsets,
    seed=st.integers(0, 2**32),
)
def test_which_neurons_fired(M, D, N, V, dtype, activation, offset, seed):
    tensors = draw(M, D, N, V, dtype, "cpu", torch.Generator().manual_seed(seed), offset)
    scores = F.linear(*(t.double() for t in tensors[:3]))
    clear = scores.abs() > TOLERANCE[dtype] * (1 + F.linear(tensors[0].double().abs(), tensors[1].double().abs()))
    for packed in (None, packed_for(tensors, activation)):
        out, fired = patch_ffn_fired(*tensors, activation, packed)
        assert torch.equal(out, patch_ffn(*tensors, activation, packed))
        assert_fired(fired, scores, clear)


@both_backends
def test_fired_over_several_blocks_and_leading_axes():
    x, keys, bias, values = draw(300, 40, 1100, 7, offset=-3)
    tensors = (x.reshape(3, 100, 40), keys, bias, values)
    scores = F.linear(x.double(), keys.double(), bias.double())
    for packed in (None, packed_for(tensors, "relu")):
        out, fired = patch_ffn_fired(*tensors, "relu", packed)
        assert out.shape == (3, 100, 7)
        assert_fired(fired, scores, scores.abs() > 1e-4)


@both_backends
@pytest.mark.parametrize("M", [5, 20])
def test_fired_without_output_columns_and_with_nan(M):
    x, keys, bias, _ = tensors = draw(M, 8, 60, 0, offset=-2)
    bias[2] = float("nan")
    for packed in (None, packed_for(tensors, "relu")):
        out, fired = patch_ffn_fired(*tensors, "relu", packed)
        assert out.shape == (M, 0)
        assert torch.equal(fired, (F.linear(x, keys, bias) > 0).nonzero())


@both_backends
def test_fired_after_the_inner_mask():
    tensors = draw(12, 20, 50, 9, offset=-2)
    masks = draw_masks(3, 20, 9, lead=(12,))
    scores = F.linear(tensors[0] * masks[0][masks[2]], *tensors[1:3])
    for packed in (None, packed_for(tensors, "relu")):
        out, fired = patch_ffn_fired(*tensors, "relu", packed, *masks)
        assert_fired(fired, scores, scores.abs() > 1e-5)
        assert torch.equal(out, patch_ffn(*tensors, "relu", packed, *masks))


# --- Arguments -------------------------------------------------------------------------------------------------------


@both_backends
def test_aliases():
    tensors = draw(4, 5, 6, 7)
    for alias, name in (("gelu_new", "gelu_tanh"), ("swish", "silu")):
        packed = packed_for(tensors, name)
        assert torch.equal(patch_ffn(*tensors, alias), patch_ffn(*tensors, name))
        assert torch.equal(patch_ffn(*tensors, alias, packed), patch_ffn(*tensors, name, packed))


BYTES = torch.zeros(64, dtype=torch.uint8)
INDEX = torch.zeros(3, dtype=torch.int64)


@both_backends
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, k, b, v: (x[:, :4], k, b, v, "relu"), "width of x and keys"),
        (lambda x, k, b, v: (x, k, b[:2], v, "relu"), "same number of neurons"),
        (lambda x, k, b, v: (x, k, b, v[:2], "relu"), "same number of neurons"),
        (lambda x, k, b, v: (x, k[0], b, v, "relu"), r"keys \[N, D\]"),
        (lambda x, k, b, v: (x.half(), k, b, v, "relu"), "one floating dtype"),
        (lambda x, k, b, v: (*(t.long() for t in (x, k, b, v)), "relu"), "one floating dtype"),
        (lambda x, k, b, v: (x, k.to("meta"), b, v, "relu"), "one device"),
        (lambda x, k, b, v: (x, k, b, v, "tanh"), "unknown activation 'tanh'; known: relu"),
        (lambda x, k, b, v: (x, k, b, v, "relu", BYTES.float()), "1-D uint8 CPU tensor"),
        (lambda x, k, b, v: (x, k, b, v, "relu", BYTES[None]), "1-D uint8 CPU tensor"),
        (lambda x, k, b, v: (x, k, b, v, "relu", None, x, None, None), "language, an int64 tensor"),
        (lambda x, k, b, v: (x, k, b, v, "relu", None, x, None, INDEX.int()), "language to be int64"),
        (lambda x, k, b, v: (x, k, b, v, "relu", None, x, None, INDEX[:2]), "language to be int64"),
        (lambda x, k, b, v: (x, k, b, v, "relu", None, x[:, :3], None, INDEX), r"mask_inner \[L, D\] with the width of x"),
        (lambda x, k, b, v: (x, k, b, v, "relu", None, None, x, INDEX), r"mask_outer \[L, V\] with the width of values"),
        (lambda x, k, b, v: (x, k, b, v, "relu", None, x, v[:2], INDEX), "of the same languages"),
        (lambda x, k, b, v: (x, k, b, v, "relu", None, x.half(), None, INDEX), "one floating dtype"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, words):
    arguments = change(*draw(3, 5, 6, 7))
    for op in (patch_ffn, patch_ffn_fired):
        with pytest.raises(MismatchError, match=words):
            op(*arguments)
