"""`torch.compile` of optimised models: pruned in the graph, in every order, and no graph more than without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import xpatch

SHAPES = ((3, 7), (2, 7), (3, 5), (4, 9), (5, 11))


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, how, backend):
    if how == "method":
        model.compile(backend=backend, fullgraph=True)
        return model
    if how == "layers":
        for layer in model.base_model.encoder.layer if hasattr(model, "bert") else model.base_model.layers:
            layer.compile(backend=backend, fullgraph=True)
        return model
    if how == "wrapper":
        return torch.compile(model, backend=backend, fullgraph=True)
    return torch.compile(lambda *args, **kwargs: model(*args, **kwargs), backend=backend, fullgraph=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "how"),
    [("bert", "wrapper"), *(pytest.param(*case, marks=pytest.mark.slow)
                            for case in (("bert", "function"), ("bert", "layers"), ("llama", "wrapper")))],
)  # fmt: skip
def test_answers_and_graphs(lively, near, family, how):
    counts, rows = {}, {}
    for optimized in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = xpatch.prepare(lively(family))
        base = copy.deepcopy(model)
        if optimized:
            xpatch.optimize(model)
        backend = CompileCounterWithBackend("eager")
        run, more = compiled(model, how, backend), {"logits_to_keep": 1} if family == "llama" else {}
        for shape in SHAPES[:2] if how == "layers" else SHAPES:
            ids = torch.randint(5, 99, shape)
            near(run(ids, **more).logits, base(ids, **more).logits)
        counts[optimized] = backend.frame_count
        values = [node.meta.get("example_value") for graph in backend.graphs[:3] for node in graph.graph.nodes]
        rows[optimized] = sum(isinstance(x, torch.Tensor) and x.ndim == 3 and x.shape[1] == 1 for x in values)
    if how != "layers":  # the last layer is no longer the same code as the others
        assert counts[True] == counts[False]
    assert rows[True] > rows[False] + 3


@torch.no_grad()
@pytest.mark.parametrize("how", ["wrapper", "method"])
def test_patches_come_and_go(lively, token_ids, patch_of, near, how):
    model = xpatch.optimize(xpatch.prepare(lively("bert")))
    backend = CompileCounterWithBackend("aot_eager")
    run, base = compiled(model, how, backend), copy.deepcopy(model)
    xpatch.optimize(xpatch.prepare(base, off=True), off=True)
    plain = run(token_ids).logits
    near(plain, base(token_ids).logits)
    frames = backend.frame_count
    for change in (
        lambda m: xpatch.apply(m, patch_of(m, "neurons"), name="a"),
        lambda m: xpatch.apply(m, patch_of(m, "neurons", seed=3, mask=True), name="b"),
        lambda m: xpatch.remove(m, "a"),
    ):
        change(model), change(base)
        with torch.compiler.set_stance("force_eager"):
            expected = base(token_ids, xpatch=xpatch.Rows(languages=["en", "de", "fr"])).logits
        near(run(token_ids, xpatch=xpatch.Rows(languages=["en", "de", "fr"])).logits, expected)
    assert backend.frame_count == frames
    xpatch.remove(model, "b")
    assert torch.equal(run(token_ids).logits, plain)
    xpatch.remove(base)
    with xpatch.disabled(model):
        near(run(token_ids).logits, base(token_ids).logits)
    xpatch.optimize(model, off=True)
    near(run(token_ids).logits, base(token_ids).logits)


@torch.no_grad()
def test_a_model_compiled_before_compiles_again(lively, token_ids, near):
    model = lively("bert")
    base = copy.deepcopy(model)
    backend = CompileCounterWithBackend("eager")
    run = torch.compile(model, backend=backend)
    near(run(token_ids).logits, base(token_ids).logits)
    assert xpatch.optimize(run) is run
    near(run(token_ids).logits, base(token_ids).logits)
    assert backend.frame_count == 2
    xpatch.apply(run, xpatch.PatchSet({"p": xpatch.PatchNeurons(
        "bert.encoder.layer.1", torch.randn(3, 32), torch.ones(3), torch.randn(3, 32), "relu")}))  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        expected = model(token_ids).logits
    near(run(token_ids).logits, expected)
    assert not torch.allclose(expected, base(token_ids).logits, atol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_inductor(lively, token_ids, patch_of, near):
    model = xpatch.optimize(xpatch.prepare(lively("bert")))
    run = torch.compile(model, fullgraph=True)
    near(run(token_ids).logits, model(token_ids).logits)
    xpatch.apply(model, patch_of(model, "neurons"))
    near(run(token_ids).logits, model(token_ids).logits)
