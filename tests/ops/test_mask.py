"""mask against indexing written out, bit for bit, on every backend this machine can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpatch.errors import MismatchError
from xpatch.ops import mask, reference

LAYOUTS = ["sliced", "transposed", "misaligned", "expanded"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

dtypes = st.sampled_from(DTYPES)
sizes = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 33, 64, 65, 255, 256, 300])
given_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def same_bits(one, two):
    assert one.shape == two.shape and one.dtype == two.dtype
    assert torch.equal(one.isnan(), two.isnan())
    assert torch.equal(one.nan_to_num().signbit(), two.nan_to_num().signbit())
    assert torch.equal(one.nan_to_num(), two.nan_to_num())


@given_backend
@given(M=st.sampled_from([0, 1, 2, 5, 130]), D=sizes, L=st.integers(1, 5), dtype=dtypes, seed=st.integers(0, 2**32))
def test_matches_the_framework_bit_for_bit(backend, device, M, D, L, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, masks = (torch.randn(n, D, generator=generator).to(device, dtype) for n in (M, L))
    language = torch.randint(0, L, (M,), generator=generator).to(device)
    if M and D:
        x[0, 0] = torch.inf
        x[-1, -1] = torch.nan
        masks[0, 0] = -0.0
    same_bits(mask(x, masks, language), x * masks[language])


@pytest.mark.parametrize("lead, named", [((), ()), ((3,), ()), ((2, 3), (2,)), ((2, 3), (2, 3)), ((2, 0, 3), (2,)),
                                         ((2, 0, 3), (2, 0)), ((2, 1, 3, 4), (2, 1))])  # fmt: skip
def test_language_over_the_first_axes(backend, lead, named):
    x, masks, language = torch.randn(*lead, 7), torch.randn(3, 7), torch.randint(0, 3, named)
    spelt_out = language.reshape([*named, *[1] * (len(lead) - len(named))]).expand(lead)
    found = mask(x, masks, language)
    assert torch.equal(found, x * masks[spelt_out]) and found.is_contiguous()


@given_backend
@given(layout=st.tuples(*[st.sampled_from(LAYOUTS)] * 2), dtype=dtypes)
def test_any_memory_layout(backend, laid_out, layout, dtype):
    x, masks = laid_out(layout[0], 9, 21, dtype), laid_out(layout[1], 4, 21, dtype)
    language = torch.randint(0, 4, (18,), dtype=torch.int32)[::2]
    same_bits(mask(x, masks, language), x * masks[language.long()])


@pytest.mark.parametrize("wrong", [-1, 3, 2**40, -(2**63)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_language_out_of_range_is_an_error(backend, dtype, wrong):
    x, masks, language = torch.randn(4, 5).to(dtype), torch.randn(3, 5).to(dtype), torch.tensor([0, 1, wrong, 2])
    with pytest.raises(MismatchError, match=rf"mask: expected language in \[0, L = 3\); found {wrong} among \(4,\)"):
        mask(x, masks, language)
    with pytest.raises(MismatchError, match="found 0"):
        mask(x, masks[:0], language[:1].expand(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_language_out_of_range_is_nan_on_a_gpu(backend):
    x, masks, language = torch.randn(3, 5).cuda(), torch.randn(3, 5).cuda(), torch.tensor([0, 3, -1]).cuda()
    found = mask(x, masks, language)
    assert torch.equal(found.isnan().all(1), torch.tensor([False, True, True]).cuda())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, m, i: (x, m[:, 1:], i), r"width of x and masks to be equal \(D\); found .* masks \(2, 4\)"),
        (lambda x, m, i: (x, m[0], i), r"masks \[L, D\]"),
        (lambda x, m, i: (x, m, i.float()), "language to hold integers; found .* torch.float32"),
        (lambda x, m, i: (x, m, i.bool()), "language to hold integers"),
        (lambda x, m, i: (x, m, i[:2]), "axes of language to be x's first axes"),
        (lambda x, m, i: (x, m, i[:, None].expand(3, 5)), "axes of language to be x's first axes"),
        (lambda x, m, i: (x.half(), m, i), "one floating dtype for x and masks"),
        (lambda x, m, i: (x.long(), m.long(), i), "one floating dtype"),
        (lambda x, m, i: (x, m.to("meta"), i), "one device for all"),
        (lambda x, m, i: (x, m, i.to("meta")), "one device for all"),
    ],
)
def test_what_does_not_fit_is_refused(backend, change, words):
    with pytest.raises(MismatchError, match=f"mask: expected .*{words}"):
        mask(*change(torch.randn(3, 5), torch.randn(2, 5), torch.tensor([0, 1, 0])))


@given(M=st.integers(1, 300), D=st.integers(1, 600), dtype=dtypes)
@settings(max_examples=15)
def test_bit_identical_for_any_thread_count(M, D, dtype):
    x, masks, language = torch.randn(M, D).to(dtype), torch.randn(3, D).to(dtype), torch.randint(0, 3, (M,))
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(mask(x, masks, language))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("named", [(), (2,), (2, 3)])
def test_schema_fake_and_autograd_registration(requires_grad, named):
    x, masks = (torch.randn(*s, requires_grad=requires_grad) for s in ((2, 3, 5), (4, 5)))
    torch.library.opcheck(torch.ops.xpatch.mask.default, (x, masks, torch.randint(0, 4, named)))


@pytest.mark.parametrize("lead, named", [((), ()), ((4,), (4,)), ((2, 2), (2,)), ((0,), (0,)), ((2, 0), (2,))])
def test_gradients_in_float64(lead, named):
    language = torch.randint(0, 3, named)
    tensors = [torch.randn(*s, 5, dtype=torch.float64, requires_grad=True) for s in (lead, (3,))]

    def run(*inputs):
        return mask(*inputs, language)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    masks, inner = torch.randn(3, 5), torch.nn.Linear(5, 5)

    def site(x, language):
        return inner(mask(inner(x), masks, language))

    compiled = torch.compile(site, fullgraph=True, dynamic=True, backend=compiler)
    for count in (2, 3, 7):
        x, language = torch.randn(count, 4, 5), torch.randint(0, 3, (count,))
        torch.testing.assert_close(compiled(x, language), site(x, language))
    compiled(torch.randn(3, 4, 5), torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert inner.weight.grad is not None


def test_torch_func_sees_through_it():
    x, masks, language = torch.randn(4, 5), torch.randn(3, 5), torch.tensor([0, 2, 1, 2])
    found = torch.func.vmap(lambda row, index: mask(row, masks, index))(x, language)
    assert torch.equal(found, reference.mask(x, masks, language))


def test_meta_tensors_give_shapes_only():
    found = mask(*(t.to("meta") for t in (torch.randn(4, 5).half(), torch.randn(2, 5).half(), torch.zeros(4).long())))
    assert found.shape == (4, 5) and found.dtype == torch.float16 and found.device.type == "meta"
