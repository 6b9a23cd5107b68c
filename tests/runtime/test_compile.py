"""torch.compile and patches, in every order: the compiled model answers as the plain one, and swaps never compile again."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import xpatch
from xpatch.errors import ConflictError
from xpatch.runtime.attach import runtime_of


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiler():
    """A backend that counts the graphs it compiles; the graphs run op by op."""
    return CompileCounterWithBackend("aot_eager")


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def both_layers(model, patch_of, seed=0):
    parts = {str(layer): patch_of(model, "neurons", seed=seed + layer, layer=layer).parts["part"] for layer in (0, 1)}
    return xpatch.PatchSet(parts=parts)


@torch.no_grad()
def test_apply_then_compile(tiny, token_ids, patch_of, compiler):
    model = tiny("bert")
    base = model(token_ids).logits
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    patched = model(token_ids).logits
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    close(compiled(token_ids).logits, patched)
    assert compiler.frame_count == 1
    for seed, more in ((1, "a"), (2, "b"), (3, "c")):  # other patches, more patches, at the same site
        xpatch.apply(compiled, patch_of(model, "neurons", seed=seed), name=more)
        close(compiled(token_ids).logits, model(token_ids).logits)
    with xpatch.disabled(compiled):
        close(compiled(token_ids).logits, base)
    assert compiler.frame_count == 1
    assert xpatch.remove(compiled) is compiled
    close(compiled(token_ids).logits, base)


@torch.no_grad()
@pytest.mark.parametrize("how", ["wrapper", "method", "function", "layers"])
def test_prepare_then_compile_then_apply_never_compiles_again(tiny, token_ids, patch_of, compiler, how):
    model = xpatch.prepare(tiny("bert"), "all")
    base = model(token_ids).logits
    run = model
    if how == "wrapper":
        run = torch.compile(model, backend=compiler, fullgraph=True)
    elif how == "method":
        model.compile(backend=compiler, fullgraph=True)
    elif how == "function":
        run = torch.compile(lambda *args, **kwargs: model(*args, **kwargs), backend=compiler, fullgraph=True)
    else:
        for layer in model.bert.encoder.layer:
            layer.compile(backend=compiler, fullgraph=True)
    close(run(token_ids).logits, base)
    frames = compiler.frame_count
    plain = copy.deepcopy(model)
    for change in (
        lambda m: xpatch.apply(m, both_layers(m, patch_of), name="a"),
        lambda m: xpatch.apply(m, both_layers(m, patch_of, seed=7), name="a"),
        lambda m: xpatch.apply(m, patch_of(m, "neurons", mask=True), name="b"),
        lambda m: xpatch.remove(m, "a"),
        lambda m: xpatch.remove(m),
    ):
        change(model), change(plain)
        for rows in (None, xpatch.Rows(languages=["en", "de", "fr"])):
            given = {} if rows is None or how in ("method", "layers") else {"xpatch": rows}
            with xpatch.rows(languages=rows.languages if rows else "en"):
                with torch.compiler.set_stance("force_eager"):
                    expected = plain(token_ids, **given).logits
                close(run(token_ids, **given).logits, expected)
    with xpatch.disabled(model):
        close(run(token_ids).logits, base)
    # A call with xpatch= is another graph than one without; nothing else is.
    assert compiler.frame_count <= frames + (1 if how == "function" else 0)


@torch.no_grad()
def test_rows_choose_in_a_compiled_model_without_compiling_again(tiny, token_ids, patch_of, compiler):
    model = xpatch.prepare(tiny("bert"))
    base = model(token_ids).logits
    for name, seed in (("a", 1), ("b", 2)):
        xpatch.apply(model, patch_of(model, "neurons", seed=seed), name=name)

    def step(ids, rows):
        return model(ids, xpatch=rows).logits

    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    for choice in (["a", "__base__", "b"], ["b", ["a", "b"], "a"], "a", [None, None, "__base__"]):
        rows = xpatch.Rows(patches=choice)
        close(compiled(token_ids, rows), step(token_ids, rows))
        wrapped = torch.compile(model, backend=compiler, fullgraph=True)
        close(wrapped(token_ids, xpatch=rows).logits, step(token_ids, rows))
    close(compiled(token_ids, xpatch.Rows(patches="__base__")), base)
    assert compiler.frame_count == 2
    with pytest.raises(Exception, match="no patch set is called 'c'"):
        compiled(token_ids, xpatch.Rows(patches="c"))
    close(compiled(token_ids, xpatch.Rows(patches="__base__")), base)  # the failed call left nothing behind


@torch.no_grad()
@pytest.mark.parametrize("how", ["wrapper", "wrapped", "method", "part", "forward", "layer"])
def test_a_model_compiled_before_is_refused_until_it_is_prepared(tiny, token_ids, patch_of, how):
    model = target = tiny("bert")
    plain = copy.deepcopy(model)
    patches = patch_of(model, "neurons")
    if how == "wrapper":
        target = torch.compile(model, backend="aot_eager")
    elif how == "wrapped":
        target = torch.compile(model, backend="aot_eager")
    elif how == "method":
        model.compile(backend="aot_eager")
    elif how == "part":
        model.bert.encoder = torch.compile(model.bert.encoder, backend="aot_eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager")
    else:
        for layer in model.bert.encoder.layer:
            layer.compile(backend="aot_eager")
    given = model if how == "wrapped" else target
    target(token_ids)
    with pytest.raises(ConflictError, match=r"compile.* Call xpatch\.prepare\(model\) first"):
        xpatch.apply(given, patches)
    assert runtime_of(given) is None
    assert xpatch.prepare(given) is given
    base = target(token_ids).logits
    close(base, plain(token_ids).logits)
    xpatch.apply(given, patches)
    with torch.compiler.set_stance("force_eager"):
        expected = xpatch.apply(plain, patches)(token_ids).logits
    close(target(token_ids).logits, expected)
    xpatch.remove(given)
    close(target(token_ids).logits, base)
    xpatch.prepare(given, off=True)
    assert runtime_of(given) is None
    close(target(token_ids).logits, base)


@torch.no_grad()
def test_patches_at_a_site_that_was_not_prepared_compile_once_more_and_hold(tiny, token_ids, patch_of, compiler):
    model = xpatch.prepare(tiny("bert"))
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    base = compiled(token_ids).logits
    xpatch.apply(model, patch_of(model, "lowrank", layer=0), name="elsewhere")
    close(compiled(token_ids).logits, model(token_ids).logits)
    assert compiler.frame_count == 2 and not torch.allclose(compiled(token_ids).logits, base)


def test_a_layer_with_patches_never_shares_code_with_one_without(tiny, token_ids, patch_of):
    """Layers compiled one by one are the same code to the compiler, which does not look at hooks unless told to."""
    model = tiny("bert", layers=3)
    xpatch.apply(model, patch_of(model, "neurons", layer=2))
    with torch.no_grad():
        patched = model(token_ids).logits
        for layer in model.bert.encoder.layer:
            layer.compile(backend="aot_eager")
        close(model(token_ids).logits, patched)


def test_gradients_of_a_compiled_patched_model(tiny, token_ids, patch_of):
    model = tiny("bert")
    xpatch.apply(
        model,
        xpatch.PatchSet(parts=both_layers(model, patch_of).parts | {"l": patch_of(model, "lowrank").parts["part"]}),
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def gradients(run, **options):
        model.zero_grad()
        logits = run(token_ids, **options).logits
        xpatch.apply(
            model, patch_of(model, "neurons", seed=9), name="meanwhile"
        )  # backward belongs to the forward's state
        logits.square().sum().backward()
        xpatch.remove(model, "meanwhile")
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(model), gradients(compiled)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)
    rows = xpatch.Rows(patches=["__base__", None, None])
    expected, found = gradients(model, xpatch=rows), gradients(compiled, xpatch=rows)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_gradients_of_a_compiled_model_with_checkpointing(tiny, token_ids, patch_of):
    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    xpatch.apply(model, both_layers(model, patch_of), name="a")
    rows = xpatch.Rows(patches=["a", "__base__", "a"])

    def gradients(run, chosen):
        model.zero_grad()
        run(token_ids, xpatch=chosen).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, everywhere = gradients(model, rows), gradients(model, xpatch.Rows(patches="a"))
    assert any(not torch.allclose(expected[name], everywhere[name]) for name in expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(torch.compile(model, backend="aot_eager"), rows)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_generate_with_a_compiled_forward(tiny, token_ids, patch_of):
    model = xpatch.prepare(tiny("gpt2-lm"))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(token_ids)}
    base = model.generate(token_ids, **options)
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    patched = model.generate(token_ids, **options)
    mixed = model.generate(token_ids, xpatch=xpatch.Rows(patches=["a", "__base__", "a"]), **options)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(model.generate(token_ids, **options), patched)
    assert torch.equal(model.generate(token_ids, xpatch=xpatch.Rows(patches=["a", "__base__", "a"]), **options), mixed)
    xpatch.remove(model)
    assert torch.equal(model.generate(token_ids, **options), base)


def test_a_script_module_is_refused(tiny, patch_of):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.extra = inner, torch.jit.script(nn.Linear(2, 2))

    inner = tiny("bert")
    with pytest.raises(ConflictError, match="'extra' is a TorchScript module"):
        xpatch.apply(Outer(inner), patch_of(inner, "neurons"))


@torch.no_grad()
def test_code_compiled_before_xpatch_came_is_warned_of(tiny, token_ids, patch_of, monkeypatch):
    from xpatch.runtime import compiled

    monkeypatch.setattr(compiled, "_guarding", False)
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    model = tiny("bert")
    with pytest.warns(UserWarning, match=r"compiled in this process before .* call xpatch\.prepare\(model\)"):
        xpatch.apply(model, patch_of(model, "neurons"))


@pytest.mark.slow
@torch.no_grad()
def test_inductor(tiny, token_ids, patch_of):
    model = xpatch.prepare(tiny("bert"), "all")
    base = model(token_ids).logits
    compiled = torch.compile(model, fullgraph=True)
    close(compiled(token_ids).logits, base)
    xpatch.apply(model, both_layers(model, patch_of), name="a")
    close(compiled(token_ids).logits, model(token_ids).logits)
    close(
        compiled(token_ids, xpatch=xpatch.Rows(patches=["a", "__base__", "a"])).logits,
        model(token_ids, xpatch=xpatch.Rows(patches=["a", "__base__", "a"])).logits,
    )
    xpatch.remove(model)
    close(compiled(token_ids).logits, base)


@torch.no_grad()
def test_compiled_calls_in_threads_see_only_published_states(tiny, token_ids, patch_of):
    torch.set_num_threads(1)
    model = xpatch.prepare(tiny("bert"), "all")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    sets = {seed: both_layers(model, patch_of, seed) for seed in (1, 5)}

    def answer():
        return tuple(compiled(token_ids).logits.flatten().tolist())

    states = {answer()}
    for patches in sets.values():
        xpatch.apply(model, patches, name="a")
        states.add(answer())
    assert len(states) == 3
    seen, failures, stop = [], [], threading.Event()

    def infer():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    seen.append(answer())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in itertools.count():
        if failures or (turn >= 150 and len(seen) > 20):
            break
        if turn % 5 == 4:
            xpatch.remove(model)
        else:
            xpatch.apply(model, sets[(1, 5)[turn % 2]], name="a")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(seen) <= states
