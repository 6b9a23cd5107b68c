"""The registered ops: schema, fake, autograd, compile, export."""

from __future__ import annotations

import pytest
import torch

from xpatch.ops import ACTIVATIONS, patch_ffn, patch_ffn_fired, reference


def draw(dtype=torch.float32, requires_grad=False, lead=(4,)):
    shapes = ((*lead, 5), (6, 5), (6,), (6, 3))
    return tuple(torch.randn(*s, dtype=dtype, requires_grad=requires_grad) for s in shapes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["patch_ffn", "patch_ffn_fired"])
def test_opcheck(name, activation, requires_grad):
    arguments = (*draw(requires_grad=requires_grad, lead=(2, 4)), activation)
    torch.library.opcheck(getattr(torch.ops.xpatch, name).default, arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_fired_has_no_gradient_and_changes_none(activation):
    tensors = draw(requires_grad=True, lead=(2, 4))
    out, fired = patch_ffn_fired(*tensors, activation)
    assert out.requires_grad and not fired.requires_grad and fired.dtype == torch.bool
    found = torch.autograd.grad(out.square().sum(), tensors)
    expected = torch.autograd.grad(patch_ffn(*tensors, activation).square().sum(), tensors)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_in_float64(activation):
    tensors = draw(torch.float64, requires_grad=True, lead=(2, 2))

    def run(*inputs):
        return patch_ffn(*inputs, activation)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("trained", range(4))
def test_gradients_of_the_native_op_are_the_reference_gradients(activation, trained):
    tensors = draw(lead=(2, 4))
    tensors[trained].requires_grad_()
    grad = torch.randn(2, 4, 3)
    found = torch.autograd.grad(patch_ffn(*tensors, activation), tensors[trained], grad)[0]
    expected = torch.autograd.grad(reference.patch_ffn(*tensors, activation), tensors[trained], grad)[0]
    torch.testing.assert_close(found, expected)


class Site(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(5, 5)
        _, self.keys, self.bias, self.values = draw()

    def forward(self, x):
        return self.inner(x) + patch_ffn(self.inner(x), self.keys, self.bias, self.values, "gelu").sum(-1, keepdim=True)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    site = Site()
    compiled = torch.compile(site, fullgraph=True, dynamic=True, backend=compiler)
    for rows in (2, 3, 7):
        x = torch.randn(rows, 5)
        torch.testing.assert_close(compiled(x), site(x))
    compiled(torch.randn(3, 5)).sum().backward()
    assert site.inner.weight.grad is not None


def test_exports_with_a_dynamic_axis():
    site = Site()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(site, (torch.randn(4, 5),), dynamic_shapes=({0: rows},))
    assert "xpatch.patch_ffn" in str(program.graph)
    x = torch.randn(9, 5)
    torch.testing.assert_close(program.module()(x), site(x))


def test_meta_tensors_give_shapes_only():
    tensors = [t.to("meta") for t in draw(torch.bfloat16)]
    found = patch_ffn(*tensors, "relu")
    assert found.shape == (4, 3) and found.dtype == torch.bfloat16 and found.device.type == "meta"
    again, fired = patch_ffn_fired(*tensors, "relu")
    assert again.shape == (4, 3) and fired.shape == (4, 6) and fired.dtype == torch.bool
