"""lowrank against the sum over deltas written out in float64, on every backend this machine can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpatch.errors import MismatchError
from xpatch.ops import lowrank, native, reference

LAYOUTS = ["sliced", "transposed", "misaligned", "expanded"]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

dtypes = st.sampled_from(list(TOLERANCE))
sizes = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 33, 64, 65, 100])
rows_of = st.sampled_from([0, 1, 2, 3, 4, 5, 17, 40])
ranks_of = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 17, 33]), max_size=9)
given_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw(M, D, V, ranks, share=0.3, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    R = sum(ranks)
    offsets = torch.tensor([0, *torch.tensor(ranks, dtype=torch.int64).cumsum(0).tolist()], device=device)
    rows = (torch.rand(M, len(ranks), generator=generator) < share).to(device)
    return randn(M, D), randn(R, D) / max(D, 1) ** 0.5, randn(R, V).t(), offsets, rows


def written_out(x, down, up, offsets, rows):
    """Delta by delta in float64, and the sum of the absolute terms, with which rounding errors grow."""
    x, down, up = x.double(), down.double(), up.double()
    out = x.new_zeros((*x.shape[:-1], up.shape[0]))
    scale = torch.ones_like(out)
    for g in range(rows.shape[-1]):
        mine = slice(int(offsets[g]), int(offsets[g + 1]))
        h = x @ down[mine].t()
        named = rows[..., g]
        while named.ndim < x.ndim:
            named = named.unsqueeze(-1)
        out = out + torch.where(named, h @ up[:, mine].t(), 0)
        scale = scale + torch.where(named, h.abs() @ up[:, mine].abs().t(), 0)
    return out, scale


def assert_close(found, tensors):
    expected, scale = written_out(*tensors)
    x = tensors[0]
    assert found.dtype == x.dtype and found.device == x.device and found.shape == expected.shape
    # The framework rounds the scores to the dtype, the native kernel does not.
    assert ((found.double() - expected).abs() <= TOLERANCE[x.dtype] * scale * (2 + x.shape[-1] ** 0.5)).all()


@given_backend
@given(M=rows_of, D=sizes, V=sizes, ranks=ranks_of, share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), dtype=dtypes,
       seed=st.integers(0, 2**32))  # fmt: skip
def test_matches_the_sum_over_deltas(backend, device, M, D, V, ranks, share, dtype, seed):
    tensors = draw(M, D, V, ranks, share, dtype, device, seed)
    assert_close(lowrank(*tensors), tensors)


def test_without_rows_every_row_gets_every_delta(backend):
    x, down, up, offsets, _ = draw(5, 7, 6, [2, 3])
    everything = torch.ones(5, 2, dtype=torch.bool)
    assert torch.equal(lowrank(x, down, up), reference.lowrank(x, down, up))
    assert torch.equal(lowrank(x, down, up, offsets), lowrank(x, down, up))
    torch.testing.assert_close(lowrank(x, down, up, offsets, everything), lowrank(x, down, up))


def test_without_offsets_one_delta_owns_all_ranks(backend):
    x, down, up, _, _ = draw(5, 7, 6, [3])
    rows = torch.tensor([[True], [False], [True], [False], [False]])
    found = lowrank(x, down, up, rows=rows)
    torch.testing.assert_close(found, torch.where(rows, lowrank(x, down, up), 0))


@pytest.mark.parametrize("lead, named", [((), ()), ((3,), ()), ((2, 3), (2,)), ((2, 3), (2, 3)), ((2, 0, 3), (2,)),
                                         ((2, 1, 3, 4), (2, 1))])  # fmt: skip
def test_rows_over_the_first_axes(backend, lead, named):
    _, down, up, offsets, _ = draw(1, 8, 6, [2, 0, 3, 1, 1, 1, 1, 1, 1, 1])
    x, rows = torch.randn(*lead, 8), torch.rand(*named, 10) < 0.3
    found = lowrank(x, down, up, offsets, rows)
    assert_close(found, (x, down, up, offsets, rows))
    spelt_out = rows.reshape(*named, *[1] * (len(lead) - len(named)), 10).expand(*lead, 10)
    torch.testing.assert_close(found, lowrank(x, down, up, offsets, spelt_out))


@given_backend
@given(layout=st.tuples(*[st.sampled_from(LAYOUTS)] * 3), dtype=dtypes)
def test_any_memory_layout(backend, laid_out, layout, dtype):
    x, down, up = (
        laid_out(kind, *shape, dtype) for kind, shape in zip(layout, ((9, 21), (13, 21), (19, 13)), strict=True)
    )
    offsets = torch.tensor([[0, 9], [4, 9], [4, 9], [9, 9], [13, 9]])[:, 0]
    rows = (torch.rand(4, 9) < 0.3).t()
    before = [t.clone() for t in (x, down, up, offsets, rows)]
    assert_close(lowrank(x, down, up, offsets, rows), (x, down, up, offsets, rows))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, down, up, offsets, rows), strict=True))


@pytest.mark.parametrize("share", [0.05, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_that_names_nothing_is_exactly_zero(backend, dtype, share):
    tensors = draw(50, 30, 20, [4] * 20, share, dtype)
    x, rows = tensors[0], tensors[-1]
    rows[7] = rows[33] = False
    x[7] = torch.nan
    x[33] = torch.inf
    found = lowrank(*tensors)
    assert torch.equal(found[[7, 33]], torch.zeros(2, 20, dtype=dtype))
    assert found[rows.any(1)].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_rows_as_in_dense_torch(bad):
    tensors = draw(37, 23, 19, [3] * 10, 0.2)
    tensors[0][3, 5] = tensors[0][36, 22] = bad
    tensors[-1][3, 2] = tensors[-1][36, 9] = True
    found, expected = lowrank(*tensors), reference.lowrank(*tensors)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[found.isinf()], expected[expected.isinf()])


def test_values_that_no_row_named_are_not_read():
    x, down, up, offsets, rows = draw(20, 16, 12, [4] * 30, 0.1)
    rows[:, 5] = False
    expected = lowrank(x, down, up, offsets, rows)
    down[20:24], up[:, 20:24] = torch.nan, torch.nan
    assert torch.equal(lowrank(x, down, up, offsets, rows), expected)


@settings(max_examples=20)
@given(M=st.integers(1, 300), D=sizes, V=sizes, ranks=ranks_of, dtype=dtypes, seed=st.integers(0, 2**32))
def test_bit_identical_for_any_thread_count(M, D, V, ranks, dtype, seed):
    tensors = draw(M, 2 * D, V, ranks * 3, 0.2, dtype, seed=seed)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(lowrank(*tensors))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_depends_neither_on_its_batch_nor_on_what_others_named():
    x, down, up, offsets, rows = draw(70, 50, 70, [4, 1, 9, 2, 33] * 4, 0.2)
    whole = lowrank(x, down, up, offsets, rows)
    for row in (0, 1, 5, 33, 69):
        one = slice(row, row + 1)
        torch.testing.assert_close(lowrank(x[one], down, up, offsets, rows[one]), whole[one])
    alone = torch.zeros_like(rows)
    alone[11] = rows[11]
    assert torch.equal(lowrank(x, down, up, offsets, alone)[11], whole[11])


@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
def test_dense_and_sparse_selections_agree(share):
    tensors = draw(64, 48, 40, [1] * 60, share)  # where all is named two matmuls run
    torch.testing.assert_close(lowrank(*tensors), reference.lowrank(*tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, d, u, o, r: (x, d[:, :-1], u, o, r), r"width of x and down to be equal \(D\).*down \(5, 6\)"),
        (lambda x, d, u, o, r: (x, d, u[:, 1:], o, r), r"same number of ranks \(R\); found x \(3, 7\)"),
        (lambda x, d, u, o, r: (x, d[0], u, o, r), r"down \[R, D\]"),
        (lambda x, d, u, o, r: (x.half(), d, u, o, r), "one floating dtype for x, down and up"),
        (lambda x, d, u, o, r: (x.long(), d.long(), u.long(), o, r), "one floating dtype"),
        (lambda x, d, u, o, r: (x, d.to("meta"), u, o, r), "one device for all"),
        (lambda x, d, u, o, r: (x, d, u, o.to("meta"), r), "one device for all; found .* offsets .* meta"),
        (lambda x, d, u, o, r: (x, d, u, o.int(), r), r"offsets \[G \+ 1\] int64.*torch.int32"),
        (lambda x, d, u, o, r: (x, d, u, o[:0], r), r"offsets \[G \+ 1\] int64"),
        (lambda x, d, u, o, r: (x, d, u, o[:1], r[:, :0]), "at least one delta"),
        (lambda x, d, u, o, r: (x, d, u, o, r.int()), r"rows \[..., G\] bool with G = 2"),
        (lambda x, d, u, o, r: (x, d, u, o, r[:, :1]), r"rows \[..., G\] bool with G = 2"),
        (lambda x, d, u, o, r: (x, d, u, None, r), r"rows \[..., G\] bool with G = 1"),
        (lambda x, d, u, o, r: (x, d, u, o, r[:2]), "axes of rows before the last to be x's first axes"),
        (lambda x, d, u, o, r: (x, d, u, o, r[None]), "axes of rows before the last to be x's first axes"),
        (lambda x, d, u, o, r: (x, d, u, o + 1, r), r"offsets to ascend from 0 to R = 5; found \[1, 3, 6\]"),
        (lambda x, d, u, o, r: (x, d, u, o - 1, r), r"found \[-1, 1, 4\]"),
        (lambda x, d, u, o, r: (x, d, u, torch.tensor([0, 6, 5]), r), r"found \[0, 6, 5\]"),
        (lambda x, d, u, o, r: (x, d, u, torch.tensor([0, -(2**62), 5]), r), r"found \[0, -4611686018427387904, 5\]"),
        (lambda x, d, u, o, r: (x, d, u, torch.tensor([0, 2, 4]), r), r"found \[0, 2, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(backend, change, words):
    with pytest.raises(MismatchError, match=f"lowrank: .*{words}"):
        lowrank(*change(*draw(3, 7, 6, [2, 3])))


def test_schema_fake_and_autograd_registration():
    x, down, up, offsets, rows = draw(6, 5, 4, [2, 0, 1], 0.5)
    for arguments in ((x, down, up, offsets, rows), (x.reshape(2, 3, 5), down, up, offsets, rows[:2]), (x, down, up)):
        for grads in (False, True):
            tensors = [t.detach().requires_grad_(grads) for t in arguments[:3]]
            torch.library.opcheck(torch.ops.xpatch.lowrank.default, (*tensors, *arguments[3:]))


@pytest.mark.parametrize("lead, named", [((), ()), ((4,), (4,)), ((2, 2), (2,)), ((0,), (0,))])
def test_gradients_in_float64(lead, named):
    _, down, up, offsets, _ = draw(1, 5, 4, [2, 0, 1], dtype=torch.float64)
    x, rows = torch.randn(*lead, 5, dtype=torch.float64), torch.rand(*named, 3) < 0.5
    tensors = [t.clone().requires_grad_() for t in (x, down, up)]

    def run(*inputs):
        return lowrank(*inputs, offsets, rows)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("trained", range(3))
def test_gradients_of_the_native_op_are_the_reference_gradients(trained):
    *tensors, offsets, rows = draw(40, 16, 12, [4] * 8, 0.2)
    tensors[trained].requires_grad_()
    grad = torch.randn(40, 12)
    found = torch.autograd.grad(lowrank(*tensors, offsets, rows), tensors[trained], grad)[0]
    expected = torch.autograd.grad(reference.lowrank(*tensors, offsets, rows), tensors[trained], grad)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    _, down, up, offsets, _ = draw(1, 5, 5, [2, 0, 1])
    inner = torch.nn.Linear(5, 5)

    def site(x, rows):
        return inner(x) + lowrank(inner(x), down, up, offsets, rows)

    compiled = torch.compile(site, fullgraph=True, dynamic=True, backend=compiler)
    for count in (2, 3, 7):
        x, rows = torch.randn(count, 5), torch.rand(count, 3) < 0.5
        torch.testing.assert_close(compiled(x, rows), site(x, rows))
    compiled(torch.randn(3, 5), torch.ones(3, 3, dtype=torch.bool)).sum().backward()
    assert inner.weight.grad is not None


def test_torch_func_sees_through_it():
    x, down, up, offsets, rows = draw(4, 5, 3, [2, 1], 0.5)
    found = torch.func.vmap(lambda row, named: lowrank(row, down, up, offsets, named))(x, rows)
    torch.testing.assert_close(found, lowrank(x, down, up, offsets, rows))


def test_meta_tensors_give_shapes_only():
    found = lowrank(*(t.to("meta") for t in draw(4, 5, 3, [2, 1], dtype=torch.bfloat16)))
    assert found.shape == (4, 3) and found.dtype == torch.bfloat16 and found.device.type == "meta"


def test_native_build_is_what_runs():
    assert native.backend_for("cpu", torch.float32) == "native"
