"""ball against the nearest key found in float64, on every backend this machine can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from xpatch.errors import BackendError, MismatchError
from xpatch.ops import ball, native, pack_balls, pack_keys, patch_ffn, reference
from xpatch.ops.registry.ball import native_ball
from xpatch.runtime.snapshot import Tensors

LAYOUTS = ["sliced", "transposed", "misaligned", "expanded"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 130, 200])
counts = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 33, 300])
given_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


needs_native = pytest.mark.skipif(
    native.backend_for("cpu", torch.float32) != "native", reason="screening needs the native build"
)


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


# --- Screening -------------------------------------------------------------------------------------------------------


def assert_screened_is_exact(x, keys, radii):
    """The screened answer, which is the unscreened one."""
    packed = pack_balls(keys, radii)
    assert (packed is None) == (len(keys) == 0 or keys.shape[1] == 0)
    plain = native_ball(x, keys, radii)
    assert torch.equal(native_ball(x, keys, radii, packed, always_screen=True), plain)
    assert torch.equal(ball(x, keys, radii, packed), plain)
    return plain


@needs_native
@settings(max_examples=80)
@given(M=st.integers(0, 40), D=st.integers(1, 300), K=st.sampled_from([0, 1, 2, 16, 17, 33, 300]),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32), wide=st.sampled_from([0.0, 0.5, 1.0, 5.0]))  # fmt: skip
def test_screened_is_unscreened(M, D, K, dtype, seed, wide):
    tensors = draw(M, D, K, dtype, seed=seed, wide=wide)
    found = assert_screened_is_exact(*tensors)
    if len(tensors[1]):
        expected, sure = certain(*tensors)
        assert torch.equal(found[sure], expected[sure])


def fp32_distances(x, keys):
    """The kernel's own distance of each row to the key of its number, by bisection over radii."""
    # A square that is subnormal may be rounded up by 2^-150, and a distance with it by 2^-75 < 3e-23 a coordinate.
    least = 3e-23 * x.shape[1] ** 0.5
    low, high = torch.zeros(len(x)), (x.double() - keys.double()).norm(dim=1).float() * 1.01 + least
    for _ in range(60):
        middle = (low + high) / 2
        inside = torch.stack(
            [native_ball(a[None], k[None], r[None])[0] for a, k, r in zip(x, keys, middle, strict=True)]
        )
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    return high


@needs_native
@settings(max_examples=20, deadline=None)
@example(D=1, K=17, scale=-19, near=1e-4, seed=0)  # squares that are subnormal
@given(D=st.sampled_from([1, 7, 16, 100, 768]), K=st.sampled_from([1, 17]), scale=st.sampled_from([-19, -9, 0, 9, 16]),
       near=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0]), seed=st.integers(0, 2**32))  # fmt: skip
def test_rows_at_exactly_the_radius_survive(D, K, scale, near, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(K, D, generator=generator) * 10.0**scale
    x = keys + near * 10.0**scale * torch.randn(K, D, generator=generator)
    distances = fp32_distances(x, keys)
    for i in range(K):
        row, key, radius = x[i : i + 1], keys[i : i + 1], distances[i : i + 1]
        assert assert_screened_is_exact(row, key, radius).item()
        just_out = assert_screened_is_exact(row, key, torch.nextafter(radius, torch.tensor(-1.0)))
        assert radius.item() < 1e-36 or not just_out.item()  # below, squares underflow and the distance is 0
    assert_screened_is_exact(x, keys, distances)


@needs_native
@settings(max_examples=60)
@given(D=st.sampled_from([1, 5, 64, 100]), row=st.integers(-45, 38), key=st.integers(-45, 38), radius=st.integers(-45, 38),
       seed=st.integers(0, 2**32))  # fmt: skip
def test_screened_at_any_scale(D, row, key, radius, seed):
    generator = torch.Generator().manual_seed(seed)
    x, keys, radii = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (6, 19, 19))
    x, keys, radii = (x * 10.0**row).float(), (keys * 10.0**key).float(), (radii[:, 0].abs() * 10.0**radius).float()
    x[0], keys[0], x[1], radii[:3] = 0.0, 0.0, keys[1], 0.0
    keys = keys.nan_to_num(posinf=1e38, neginf=-1e38)
    assert_screened_is_exact(x, keys, radii)


@needs_native
def test_screened_with_what_is_not_finite():
    keys, radii = torch.randn(40, 70), torch.full((40,), 1e4)
    x = torch.randn(7, 70)
    x[0, 3] = x[1, 69] = torch.nan
    x[2, 3] = torch.inf
    x[3, 69] = -torch.inf
    x[4] = 1e30
    assert assert_screened_is_exact(x, keys, radii).tolist() == [False] * 5 + [True] * 2
    radii[0] = torch.inf
    assert assert_screened_is_exact(x, keys, radii).tolist() == [False] * 2 + [True] * 5
    assert not assert_screened_is_exact(x, keys, torch.full((40,), torch.nan)).any()
    assert not assert_screened_is_exact(x, keys, torch.full((40,), -1.0)).any()
    keys[5, 3] = torch.nan
    assert_screened_is_exact(x, keys, torch.full((40,), 10.0))


@needs_native
@pytest.mark.parametrize("D", [1, 5, 64, 200])
def test_screened_ties_go_to_the_first_key(D):
    key = torch.randn(1, D)
    keys = torch.cat([torch.randn(300, D) + 50, key, torch.randn(20, D) - 50, key.repeat(3, 1)])
    for inside in (True, False):
        radii = torch.full((324,), 0.0)
        radii[300] = 2.0 if inside else 0.01
        radii[321:] = 0.01 if inside else 2.0
        assert assert_screened_is_exact(key + 1 / D**0.5, keys, radii).tolist() == [inside]


@needs_native
@settings(max_examples=10)
@given(M=st.sampled_from([1, 40, 300]), K=st.sampled_from([257, 2000]), dtype=st.sampled_from(DTYPES))
def test_screened_the_same_for_any_thread_count(M, K, dtype):
    tensors = draw(M, 70, K, dtype)
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        assert_screened_is_exact(*tensors)


@needs_native
def test_screening_passes_over_far_keys():
    """A key out of a row's reach is not read: one that is changed after packing is not missed."""
    keys, x = torch.randn(300, 256), torch.randn(20, 256)
    radii = torch.full((300,), 8.0)
    packed = pack_balls(keys, radii)
    keys[:] = x[0]
    assert not native_ball(x, keys, radii, packed, always_screen=True).any()
    assert native_ball(x, keys, radii)[0]


@needs_native
def test_screening_gives_up_where_all_keys_are_close():
    generator = torch.Generator().manual_seed(1)
    centre = 50 * torch.randn(1, 64, generator=generator)
    keys, x = (centre + torch.randn(n, 64, generator=generator) for n in (2000, 90))
    expected, sure = certain(x, keys, radii := torch.full((2000,), 8.0))
    assert torch.equal(assert_screened_is_exact(x, keys, radii)[sure], expected[sure])
    assert_screened_is_exact(x, torch.cat([keys, torch.randn(2000, 64)]), radii.repeat(2))


@needs_native
def test_packed_balls_that_do_not_belong_are_refused():
    x, keys, radii = torch.randn(3, 8), torch.randn(400, 8), torch.rand(400)
    packed = pack_balls(keys, radii)
    for wrong in (packed[:-1], packed[:1], torch.zeros_like(packed), pack_balls(keys[1:], radii[1:]),
                  pack_keys(keys, radii, "relu")):  # fmt: skip
        with pytest.raises(BackendError, match="packed keys"):
            native_ball(x, keys, radii, wrong, always_screen=True)
    with pytest.raises(MismatchError, match=r"ball: expected packed .* found .* packed \(2,\)"):
        ball(x, keys, radii, torch.zeros(2))
    with pytest.raises(BackendError, match="packed keys"):
        patch_ffn(x, keys, radii, keys, "relu", packed)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda k, r: (k[0], r), r"keys \[K, D\] and radii \[K\]"),
        (lambda k, r: (k, r[1:]), r"keys \[K, D\] and radii \[K\]"),
        (lambda k, r: (k.half(), r), "one dtype"),
        (lambda k, r: (k.to("meta"), r), "one device"),
    ],
)
def test_balls_that_cannot_be_packed(change, words):
    with pytest.raises(MismatchError, match=f"pack_balls: expected .*{words}"):
        pack_balls(*change(torch.randn(4, 5), torch.rand(4)))


def test_balls_without_a_packed_form():
    for keys in (torch.randn(4, 5).double(), torch.randn(0, 5), torch.randn(4, 0), torch.randn(1, 32769),
                 torch.randn(4, 5, device="meta")):  # fmt: skip
        assert pack_balls(keys, keys.new_ones(len(keys))) is None


@needs_native
def test_packed_balls_pass_opcheck():
    x, keys, radii = draw(6, 5, 300)
    packed = pack_balls(keys, radii)
    torch.library.opcheck(torch.ops.xpatch.ball.default, (x.reshape(2, 3, 5).requires_grad_(), keys, radii, packed))


@needs_native
def test_a_prepared_gate_is_packed():
    keys, radii = torch.randn(5, 8), torch.rand(5)
    tensors = Tensors({"gate_keys": keys, "gate_radii": radii}).on(torch.device("cpu"), torch.float32)
    assert torch.equal(tensors["gate_packed"], pack_balls(keys, radii))
