"""ball against the nearest key found in float64, on every backend this machine can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpatch.errors import MismatchError
from xpatch.ops import ball, reference

LAYOUTS = ["sliced", "transposed", "misaligned", "expanded"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 130, 200])
counts = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 33, 300])
given_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw(M, D, K, dtype=torch.float32, device="cpu", seed=0, wide=1.0):
    """Keys in clumps; every other row near a key; radii around the distances that occur."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    keys = randn(max(K // 4, 1), D).repeat(4, 1)[: max(K, 1)] + 0.3 * randn(max(K // 4, 1) * 4, D)[: max(K, 1)]
    keys = keys[: min(K, len(keys))]
    x = randn(M, D)
    if len(keys):
        x[::2] = keys[torch.randint(0, len(keys), (len(x[::2]),), generator=generator)] + 0.2 * randn(len(x[::2]), D)
    radii = wide * D**0.5 * 0.4 * torch.rand(len(keys), generator=generator)
    return x.to(device, dtype), keys.to(device, dtype), radii.to(device, dtype)


def certain(x, keys, radii):
    """The answer in float64, and where fp32 can have no doubt about it."""
    x, keys, radii = x.double(), keys.double(), radii.double()
    distance = (x[:, None] - keys).norm(dim=-1)
    nearest = distance.argmin(1)
    best = distance.gather(1, nearest[:, None])
    off = (best - radii[nearest, None]).abs()[:, 0]
    rivals = ((distance - best) < 1e-5 * (1 + best)).sum(1)
    return best[:, 0] <= radii[nearest], (off > 1e-5 * (1 + best[:, 0])) & (rivals == 1)


@given_backend
@given(M=counts, D=sizes, K=counts, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32),
       wide=st.sampled_from([0.5, 1.0, 5.0]))  # fmt: skip
def test_matches_float64(backend, device, M, D, K, dtype, seed, wide):
    tensors = draw(M, D, K, dtype, device, seed, wide)
    found = ball(*tensors)
    assert found.shape == (M,) and found.dtype == torch.bool and found.device == tensors[0].device
    if len(tensors[1]) == 0:
        assert not found.any()
    else:
        expected, sure = certain(*tensors)
        assert torch.equal(found[sure], expected[sure])


def test_both_answers_and_both_passes_occur():
    x, keys, radii = draw(400, 100, 300, wide=2.0)
    found = ball(x, keys, radii)
    within_some = (torch.cdist(x.double(), keys.double()) <= radii.double()).any(1)
    assert found.any() and not found.all() and (within_some & ~found).any()


@pytest.mark.parametrize("D", [1, 5, 64, 200])
def test_of_equal_distances_the_first_key_counts(backend, D):
    key = torch.randn(1, D)
    keys = torch.cat([torch.randn(300, D) + 50, key, torch.randn(20, D) - 50, key.repeat(3, 1)])
    for inside in (True, False):
        radii = torch.full((324,), 0.0)
        radii[300] = 2.0 if inside else 0.01
        radii[321:] = 0.01 if inside else 2.0
        x = key + 1 / D**0.5
        assert ball(x, keys, radii).tolist() == [inside]


def test_a_distance_equal_to_its_radius_is_inside(backend):
    keys = torch.zeros(5, 128)
    x = torch.zeros(3, 128)
    x[:, 100] = torch.tensor([3.0, 4.0, 5.0])
    radii = torch.tensor([4.0, 9.0, 9.0, 9.0, 9.0])
    assert ball(x, keys, radii).tolist() == [True, True, False]
    assert ball(torch.zeros(1, 128), keys, torch.zeros(5)).tolist() == [True]
    assert ball(torch.zeros(1, 128), keys, torch.full((5,), -1.0)).tolist() == [False]
    tiny = torch.full((1, 128), 1e-30)
    assert ball(tiny, keys, torch.full((5,), 1e-29)).tolist() == [True]


def test_rows_and_radii_that_are_not_finite(backend):
    keys, radii = torch.randn(9, 70), torch.full((9,), 1e4)
    x = torch.zeros(6, 70)
    x[0, 3] = x[1, 69] = torch.nan
    x[2, 3] = torch.inf
    x[3, 69] = -torch.inf
    x[4] = 1e30  # whose distance overflows
    assert ball(x, keys, radii).tolist() == [False, False, False, False, False, True]
    radii[0] = torch.inf
    assert ball(x, keys, radii).tolist() == [False, False, True, True, True, True]
    assert ball(x, keys, torch.full((9,), torch.nan)).tolist() == [False] * 6


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3)])
def test_leading_axes(backend, lead):
    _, keys, radii = draw(1, 8, 5)
    x = torch.randn(*lead, 8)
    found = ball(x, keys, radii)
    assert found.shape == lead and found.is_contiguous()
    assert torch.equal(found.reshape(-1), reference.ball(x.reshape(-1, 8), keys, radii))


@pytest.mark.parametrize("M, D, K", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0), (2, 0, 0)])
def test_sizes_of_zero(backend, M, D, K):
    found = ball(torch.randn(M, D), torch.randn(K, D), torch.ones(K))
    assert found.tolist() == [D == 0 and K > 0] * M


@given_backend
@given(layout=st.tuples(*[st.sampled_from(LAYOUTS)] * 2), dtype=st.sampled_from(DTYPES))
def test_any_memory_layout(backend, laid_out, layout, dtype):
    x, keys = laid_out(layout[0], 9, 70, dtype), laid_out(layout[1], 13, 70, dtype)
    radii = (12 * torch.rand(26)).to(dtype)[::2]
    expected, sure = certain(x, keys, radii)
    if layout[1] == "expanded":
        expected, sure = ball(x, keys.contiguous(), radii), torch.ones(9, dtype=torch.bool)
    assert torch.equal(ball(x, keys, radii)[sure], expected[sure])


@settings(max_examples=15)
@given(M=st.sampled_from([1, 3, 40, 300]), K=st.sampled_from([1, 255, 257, 2000]), dtype=st.sampled_from(DTYPES))
def test_the_same_for_any_thread_count(M, K, dtype):
    tensors = draw(M, 70, K, dtype)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(ball(*tensors))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_does_not_depend_on_its_batch():
    x, keys, radii = draw(300, 70, 500)
    whole = ball(x, keys, radii)
    assert torch.equal(torch.cat([ball(row, keys, radii) for row in x.split(1)]), whole)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, k, r: (x, k[:, 1:], r), r"width of x and keys to be equal \(D\); found .* keys \(4, 4\)"),
        (lambda x, k, r: (x, k[0], r), r"keys \[K, D\]"),
        (lambda x, k, r: (x, k, r[1:]), r"same number of keys \(K\)"),
        (lambda x, k, r: (x, k, r[:, None]), r"radii \[K\]"),
        (lambda x, k, r: (x.half(), k, r), "one floating dtype"),
        (lambda x, k, r: (x.long(), k.long(), r.long()), "one floating dtype"),
        (lambda x, k, r: (x, k.to("meta"), r), "one device"),
    ],
)
def test_what_does_not_fit_is_refused(backend, change, words):
    with pytest.raises(MismatchError, match=f"ball: expected .*{words}"):
        ball(*change(torch.randn(3, 5), torch.randn(4, 5), torch.rand(4)))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_schema_fake_and_no_gradient(requires_grad):
    tensors = [t.requires_grad_(requires_grad) for t in draw(6, 5, 4)]
    torch.library.opcheck(torch.ops.xpatch.ball.default, (tensors[0].reshape(2, 3, 5), *tensors[1:]))
    assert not ball(*tensors).requires_grad


def test_float64_takes_the_reference():
    tensors = [t.double() for t in draw(50, 40, 60)]
    assert torch.equal(ball(*tensors), certain(*tensors)[0])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    _, keys, radii = draw(1, 5, 9, wide=5.0)
    inner = torch.nn.Linear(5, 5)

    def site(x):
        x = inner(x)
        return torch.where(ball(x, keys, radii).unsqueeze(-1), x, 0)

    compiled = torch.compile(site, fullgraph=True, dynamic=True, backend=compiler)
    for count in (2, 3, 7):
        x = torch.randn(count, 5)
        torch.testing.assert_close(compiled(x), site(x))
    compiled(torch.randn(3, 5)).sum().backward()


def test_torch_func_sees_through_it():
    x, keys, radii = draw(4, 5, 9)
    assert torch.equal(torch.func.vmap(lambda row: ball(row, keys, radii))(x), ball(x, keys, radii))


def test_meta_tensors_give_shapes_only():
    found = ball(*(t.to("meta") for t in draw(4, 5, 9)))
    assert found.shape == (4,) and found.dtype == torch.bool and found.device.type == "meta"
