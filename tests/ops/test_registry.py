"""The registered ops: schema, fake, autograd, torch.func, compile, export; with packed keys and masks and without."""

from __future__ import annotations

import itertools

import pytest
import torch

from xpatch.ops import ACTIVATIONS, native, pack_keys, patch_ffn, patch_ffn_fired, reference
from xpatch.ops.registry.patch_ffn import native_call

MASKS = {"no masks": (False, False), "inner": (True, False), "outer": (False, True), "both masks": (True, True)}
with_masks = pytest.mark.parametrize("which", MASKS)
with_packing = pytest.mark.parametrize("packing", [True, False], ids=["packed", "plain"])
with_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def draw(dtype=torch.float32, requires_grad=False, lead=(4,), N=6):
    """Few neurons fire, so that with packed keys the native kernel does not give way to dense matmuls."""
    shapes = ((*lead, 5), (N, 5), (N,), (N, 3))
    tensors = [torch.randn(*s, dtype=dtype) for s in shapes]
    tensors[2] -= 4
    return tuple(t.requires_grad_(requires_grad) for t in tensors)


def draw_masks(which, dtype=torch.float32, requires_grad=False, lead=(4,)):
    inner, outer = (
        torch.rand(2, width, dtype=dtype) + 0.5 if wanted else None
        for width, wanted in zip((5, 3), MASKS[which], strict=True)
    )
    for mask in (inner, outer):
        if mask is not None:
            mask.requires_grad_(requires_grad)
    return inner, outer, None if which == "no masks" else torch.randint(2, lead)


def draw_all(which, packing, activation, dtype=torch.float32, requires_grad=False, lead=(4,), N=6):
    tensors = draw(dtype, requires_grad, lead, N)
    packed = pack_keys(tensors[1], tensors[2], activation) if packing else None
    return (*tensors, activation, packed, *draw_masks(which, dtype, requires_grad, lead[:1]))


def floats(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.dtype.is_floating_point]


@with_masks
@with_packing
@with_activation
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["patch_ffn", "patch_ffn_fired"])
def test_opcheck(name, requires_grad, activation, packing, which):
    arguments = draw_all(which, packing, activation, requires_grad=requires_grad, lead=(2, 4))
    # The remaining check, of compilation, is next; it takes a hundred times as long.
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(getattr(torch.ops.xpatch, name).default, arguments, test_utils=checks)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ACTIVATIONS if name != "relu"]


@with_masks
@with_packing
@pytest.mark.parametrize("activation", ["relu", *OTHERS])
@pytest.mark.parametrize("name", ["patch_ffn", "patch_ffn_fired"])
def test_opcheck_of_compilation(name, activation, packing, which):
    arguments = draw_all(which, packing, activation, requires_grad=True, lead=(2, 4))
    op = getattr(torch.ops.xpatch, name).default
    torch.library.opcheck(op, arguments, test_utils="test_aot_dispatch_dynamic")


@with_packing
@with_activation
def test_what_fired_has_no_gradient_and_changes_none(activation, packing):
    arguments = draw_all("both masks", packing, activation, requires_grad=True, lead=(2, 4))
    out, fired = patch_ffn_fired(*arguments)
    assert out.requires_grad and not fired.requires_grad and fired.dtype == torch.int64
    found = torch.autograd.grad(out.square().sum(), floats(arguments))
    expected = torch.autograd.grad(patch_ffn(*arguments).square().sum(), floats(arguments))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@with_masks
@with_activation
def test_gradients_in_float64(activation, which):
    arguments = draw_all(which, False, activation, torch.float64, requires_grad=True, lead=(2, 2))
    arguments[2].data += 4  # gradients that are not all 0
    language = arguments[-1]

    def run(x, keys, bias, values, *masks):
        rest = iter(masks)
        inner, outer = (next(rest) if wanted else None for wanted in MASKS[which])
        return patch_ffn(x, keys, bias, values, activation, None, inner, outer, language)

    assert torch.autograd.gradcheck(run, floats(arguments))
    assert torch.autograd.gradgradcheck(run, floats(arguments))


@with_packing
@with_activation
@pytest.mark.parametrize("trained", range(6))
def test_gradients_of_the_op_are_the_reference_gradients(trained, activation, packing):
    arguments = draw_all("both masks", packing, activation, lead=(2, 4), N=40)
    trainable = floats(arguments)[trained].requires_grad_()
    grad = torch.randn(2, 4, 3)
    found = torch.autograd.grad(patch_ffn(*arguments), trainable, grad)[0]
    expected = torch.autograd.grad(reference.patch_ffn(*arguments[:5], *arguments[6:]), trainable, grad)[0]
    torch.testing.assert_close(found, expected)


@with_packing
def test_a_gradient_changes_no_bits(packing):
    arguments = draw_all("both masks", packing, "relu", lead=(2, 4), N=40)
    plain = patch_ffn(*arguments)
    arguments[0].requires_grad_()
    assert torch.equal(patch_ffn(*arguments), plain)
    with torch.no_grad():
        assert not patch_ffn(*arguments).requires_grad
    with torch.inference_mode():
        assert torch.equal(patch_ffn(*arguments), plain)


@with_masks
@with_packing
def test_torch_func_sees_through_the_formula(packing, which):
    x, *others = draw_all(which, packing, "gelu", N=20)
    found = torch.func.grad(lambda x: patch_ffn(x, *others).square().sum())(x)
    expected = torch.func.grad(lambda x: reference.patch_ffn(x, *others[:4], *others[5:]).square().sum())(x)
    torch.testing.assert_close(found, expected)
    out = torch.func.vmap(lambda x: patch_ffn(x, *others[:5]))(x)
    torch.testing.assert_close(out, reference.patch_ffn(x, *others[:4]))


class Site(torch.nn.Module):
    def __init__(self, packing=True, which="both masks", activation="gelu"):
        super().__init__()
        self.inner, self.activation = torch.nn.Linear(5, 5), activation
        _, self.keys, self.bias, self.values = draw(N=40)
        self.packed = pack_keys(self.keys, self.bias, activation) if packing else None
        self.mask_inner, self.mask_outer, _ = draw_masks(which)

    def forward(self, x, language=None):
        arguments = (self.keys, self.bias, self.values, self.activation, self.packed)
        masks = (self.mask_inner, self.mask_outer, language)
        return self.inner(x) + patch_ffn(self.inner(x), *arguments, *masks).sum(-1, keepdim=True)


@pytest.fixture
def compiles():
    """A list that grows by one with each graph that Dynamo hands to the backend."""
    torch._dynamo.reset()
    graphs = []
    yield graphs
    torch._dynamo.reset()


def counting(graphs, backend):
    def compile_fx(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    return compile_fx


@with_packing
@pytest.mark.parametrize("which", ["no masks", "both masks"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_once(compiler, which, packing, compiles):
    site = Site(packing, which)
    compiled = torch.compile(site, fullgraph=True, dynamic=True, backend=counting(compiles, compiler))
    with torch.no_grad():
        for rows in (6, 11, 7, 50):  # sizes that no other axis has
            arguments = (torch.randn(rows, 5), None if which == "no masks" else torch.randint(2, (rows,)))
            torch.testing.assert_close(compiled(*arguments), site(*arguments))
    assert len(compiles) == 1
    assert "xpatch.patch_ffn" in compiles[0].code
    compiled(*arguments).sum().backward()
    assert site.inner.weight.grad is not None


@with_packing
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_what_fired_compiles(compiler, packing):
    tensors = draw(lead=(9,), N=40)
    packed = pack_keys(tensors[1], tensors[2], "relu") if packing else None
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=compiler)
    def run(x):
        out, fired = patch_ffn_fired(x, *tensors[1:], "relu", packed)
        return out * 2, fired + 1

    for scale in (1.0, 0.0, 30.0):
        x = tensors[0] * scale
        out, fired = run(x)
        expected, pairs = patch_ffn_fired(x, *tensors[1:], "relu", packed)
        assert torch.equal(out, expected * 2) and torch.equal(fired, pairs + 1)


@with_packing
def test_exports_with_a_dynamic_axis(packing):
    site = Site(packing)
    rows = torch.export.Dim("rows", min=2)
    language = torch.tensor([0, 1, 1, 0])
    program = torch.export.export(site, (torch.randn(4, 5), language), dynamic_shapes=({0: rows}, {0: rows}))
    assert "xpatch.patch_ffn" in str(program.graph)
    x, language = torch.randn(9, 5), torch.randint(2, (9,))
    torch.testing.assert_close(program.module()(x, language), site(x, language))


@with_masks
@with_packing
def test_meta_tensors_give_shapes_only(packing, which):
    tensors = draw(torch.bfloat16)
    packed = pack_keys(tensors[1], tensors[2], "relu") if packing else None
    *tensors, inner, outer, language = (
        None if t is None else t.to("meta") for t in (*tensors, *draw_masks(which, torch.bfloat16))
    )
    found = patch_ffn(*tensors, "relu", packed, inner, outer, language)
    assert found.shape == (4, 3) and found.dtype == torch.bfloat16 and found.device.type == "meta"


def test_fakes_have_the_strides_of_the_real():
    for packing, lead in itertools.product([True, False], [(4,), (2, 3)]):
        arguments = draw_all("both masks", packing, "relu", lead=lead, N=40)
        with torch._subclasses.FakeTensorMode(
            allow_non_fake_inputs=True, shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()
        ):
            fakes = torch.ops.xpatch.patch_ffn_fired(*arguments)
        for fake, real in zip(fakes, patch_ffn_fired(*arguments), strict=True):
            assert fake.dtype == real.dtype and fake.stride() == real.stride() and fake.ndim == real.ndim


@pytest.mark.skipif(not native.available(), reason="no native build")
def test_packed_keys_do_reach_the_kernel(monkeypatch):
    """And plain ones do not: nobody rewrites a BLAS."""
    calls = []
    monkeypatch.setattr(
        "xpatch.ops.registry.patch_ffn.native_call", lambda *a, **k: calls.append(1) or native_call(*a, **k)
    )
    for packing, expected in ((False, 0), (True, 1)):
        patch_ffn(*draw_all("both masks", packing, "relu", N=40))
        assert len(calls) == expected
    arguments = draw_all("both masks", True, "relu", requires_grad=True, N=40)
    patch_ffn(*arguments)
    patch_ffn_fired(*arguments)
    assert len(calls) == 3
