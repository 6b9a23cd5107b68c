"""patch_ffn_capacity: the part of fixed buffers that is in use, against patch_ffn on that part alone."""

from __future__ import annotations

import pytest
import torch

from xpatch.errors import MismatchError
from xpatch.ops import ACTIVATIONS, patch_ffn, patch_ffn_capacity
from xpatch.ops.registry import capacity as module

C, D, V = 9, 5, 3


def draw(dtype=torch.float32, requires_grad=False, lead=(2, 4)):
    x = torch.randn(*lead, D, dtype=dtype, requires_grad=requires_grad)
    return x, torch.randn(2, C, D, dtype=dtype), torch.randn(2, C, dtype=dtype), torch.randn(2, C, V, dtype=dtype)


def state(live, half):
    return torch.tensor([live, 4] if half == 0 else [4, live]), torch.tensor([half])


@pytest.fixture(params=["cpu", "selection"])
def op(request, monkeypatch):
    """The operator, and its reference where the host may not look at the counts."""
    if request.param == "cpu":
        return patch_ffn_capacity
    return lambda *arguments, y=None: module._by_selection(*arguments, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("live", [0, 1, 6, C])
def test_equals_patch_ffn_on_the_part_in_use(op, activation, half, live):
    x, *buffers = draw()
    used = [buffer[half, :live].clone() for buffer in buffers]
    for buffer in buffers:
        buffer[1 - half] = float("nan")
        buffer[half, live:] = float("nan")
    expected = patch_ffn(x, *used, activation)
    torch.testing.assert_close(op(x, *buffers, *state(live, half), activation), expected)
    y = torch.randn(2, 4, V)
    torch.testing.assert_close(op(x, *buffers, *state(live, half), activation, y=y), y + expected)


@pytest.mark.parametrize(("live", "taken"), [(-3, 0), (C + 5, C), (2**40, C)])
def test_counts_stay_inside_the_buffers(op, live, taken):
    x, *buffers = draw()
    expected = patch_ffn(x, *(buffer[0, :taken] for buffer in buffers), "relu")
    torch.testing.assert_close(op(x, *buffers, torch.tensor([live, 0]), torch.tensor([0]), "relu"), expected)


def test_the_sum_is_rounded_once_to_the_output_dtype(op):
    x, *buffers = draw()
    y = torch.randn(2, 4, V).bfloat16()
    found = op(x, *buffers, *state(C, 1), "gelu", y=y)
    delta = patch_ffn(x, *(buffer[1] for buffer in buffers), "gelu")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (y.float() + delta).bfloat16())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("with_y", [False, True])
def test_opcheck(activation, requires_grad, with_y):
    x, *buffers = draw(requires_grad=requires_grad)
    y = torch.randn(2, 4, V, requires_grad=requires_grad) if with_y else None
    arguments = (x, *buffers, *state(6, 0), activation, y)
    torch.library.opcheck(torch.ops.xpatch.patch_ffn_capacity.default, arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_in_float64(activation):
    x, *buffers = draw(torch.float64, requires_grad=True, lead=(3,))
    y = torch.randn(3, V, dtype=torch.float64, requires_grad=True)
    for buffer in buffers:
        buffer[1, 6:] = float("nan")

    def run(x, y):
        return patch_ffn_capacity(x, *buffers, *state(6, 1), activation, y)

    assert torch.autograd.gradcheck(run, (x, y))
    assert torch.autograd.gradgradcheck(run, (x, y))


def test_buffers_take_no_gradient():
    x, keys, bias, values = draw(requires_grad=True)
    with pytest.raises(MismatchError, match="keys, bias and values without gradients"):
        patch_ffn_capacity(x, keys.requires_grad_(), bias, values, *state(6, 0), "relu")


def test_compiles_as_one_graph_and_follows_the_counts():
    x, *buffers = draw()
    live, epoch = state(6, 0)
    compiled = torch.compile(
        lambda x, y: patch_ffn_capacity(x + 1, *buffers, live, epoch, "relu", y), fullgraph=True, backend="aot_eager"
    )
    y = torch.randn(2, 4, V)
    for count, half in ((6, 0), (2, 0), (4, 1)):
        live[half], epoch[0] = count, half
        expected = y + patch_ffn(x + 1, *(buffer[half, :count] for buffer in buffers), "relu")
        torch.testing.assert_close(compiled(x, y), expected)


def test_in_a_transform():
    x, *buffers = draw()
    found = torch.func.vmap(lambda row: patch_ffn_capacity(row, *buffers, *state(6, 0), "silu"))(x)
    torch.testing.assert_close(found, patch_ffn_capacity(x, *buffers, *state(6, 0), "silu"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "x": t["x"][..., :3]}, "width of x and keys"),
        (lambda t: {**t, "keys": t["keys"][0]}, r"keys \[2, C, D\]"),
        (lambda t: {**t, "bias": t["bias"][:, :4]}, "same number of neurons"),
        (lambda t: {**t, "live": t["live"].int()}, "both int64"),
        (lambda t: {**t, "epoch": torch.zeros(2).long()}, r"epoch \[1\]"),
        (lambda t: {**t, "x": t["x"].double()}, "one floating dtype"),
        (lambda t: {**t, "y": torch.zeros(2, 4, V + 1)}, r"y \[..., V\]"),
        (lambda t: {**t, "live": t["live"].to("meta")}, "one device"),
        (lambda t: {**t, "keys": t["keys"].transpose(0, 1).contiguous().transpose(0, 1)}, "contiguous buffers"),
        (lambda t: {**t, "activation": "step"}, "unknown activation 'step'"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    x, keys, bias, values = draw()
    live, epoch = state(6, 0)
    good = {"x": x, "keys": keys, "bias": bias, "values": values, "live": live, "epoch": epoch, "activation": "relu"}
    with pytest.raises(MismatchError, match=words):
        patch_ffn_capacity(**change(good))
