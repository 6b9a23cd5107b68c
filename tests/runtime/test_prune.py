"""Optimised models and patches: the answers of the full patched model, whatever is applied, chosen, copied or taken off."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import xpatch
from xpatch import LowRankDelta, PatchNeurons, PatchSet
from xpatch.models.anatomy import final_ffn, linear
from xpatch.runtime.attach import runtime_of

FAMILIES = ("bert", "distilbert", "gpt2", "llama")
pytestmark = pytest.mark.filterwarnings("ignore:.*(language masks|without its patches).*")


@pytest.fixture
def lively(tiny):
    def make(family):
        model = tiny(family, initializer_range=0.3)
        if family != "llama":
            return model
        import transformers as hf

        model.config.pad_token_id = 0
        return hf.LlamaForSequenceClassification(model.config).eval()

    return make


def near(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, scale), rtol=1e-5)


def at_the_last_layer(model, family):
    """A low-rank delta beside each linear layer of the last layer's attention."""
    names = {
        "bert": [f"bert.encoder.layer.1.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")],
        "distilbert": [f"distilbert.transformer.layer.1.attention.{name}_lin" for name in "qkv"],
        "gpt2": [f"transformer.h.1.attn.{name}" for name in ("c_attn", "c_proj")],
        "llama": [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"],
    }[family]  # fmt: skip
    shapes = {name: linear(model, name)[1:] for name in names}
    return PatchSet(
        {name: LowRankDelta(name, torch.randn(2, d) / 6, torch.randn(v, 2)) for name, (d, v) in shapes.items()}
    )


@torch.no_grad()
@pytest.mark.parametrize("order", ["optimize first", "apply first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patches_of_every_form_before_and_after(lively, token_ids, patch_of, family, order):
    full = lively(family)
    model, plain = copy.deepcopy(full), copy.deepcopy(full)
    sets = {
        "neurons": patch_of(full, "neurons"),
        "gated": patch_of(full, "neurons", seed=1, gate="ball"),
        "masked": patch_of(full, "neurons", seed=2, mask=True),
        "lowrank": patch_of(full, "lowrank", seed=3),
        "dense": patch_of(full, "dense", seed=4),
        "early": patch_of(full, "neurons", seed=5, layer=0),
        "attention": at_the_last_layer(full, family),
    }
    if order == "optimize first":
        xpatch.optimize(model)
    for name, patches in sets.items():
        xpatch.apply(full, patches, name=name), xpatch.apply(model, patches, name=name)
    if order == "apply first":
        xpatch.optimize(model)
    seen = []
    handle = model.get_submodule(final_ffn(model).up).register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape))
    )
    chosen = [
        None,
        xpatch.Rows(languages=["en", "de", "fr"]),
        xpatch.Rows(patches=["neurons", ["masked", "attention"], "__base__"], languages="en"),
        xpatch.Rows(patches=[None, "dense", ["gated", "early"]]),
    ]
    for rows in chosen:
        near(model(token_ids, xpatch=rows).logits, full(token_ids, xpatch=rows).logits)
    with xpatch.rows(languages="de"):
        near(model(token_ids).logits, full(token_ids).logits)
    assert set(seen) == {(3, 1, 32)}
    handle.remove()
    with xpatch.disabled(model):
        assert torch.equal(model(token_ids).logits, plain(token_ids).logits)
    for name in sets:
        xpatch.remove(full, name), xpatch.remove(model, name)
        near(model(token_ids).logits, full(token_ids).logits)
    assert xpatch.status(model).optimized in ("first", "last")
    xpatch.optimize(model, off=True)
    assert runtime_of(model) is None and torch.equal(model(token_ids).logits, plain(token_ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("neurons", [1, 300])
def test_one_neuron_and_many(lively, token_ids, neurons):
    model = lively("bert")
    part = PatchNeurons(
        "bert.encoder.layer.1", torch.randn(neurons, 32), torch.randn(neurons), torch.randn(neurons, 32), "gelu"
    )
    expected = xpatch.apply(copy.deepcopy(model), PatchSet({"p": part}))(token_ids).logits
    near(xpatch.apply(xpatch.optimize(model), PatchSet({"p": part}))(token_ids).logits, expected)


@torch.no_grad()
def test_off_leaves_the_patches_and_the_prepared_sites(lively, token_ids, patch_of):
    model = lively("bert")
    xpatch.apply(xpatch.prepare(model), patch_of(model, "neurons"), name="a")
    expected, hooks = model(token_ids).logits, [len(part._forward_hooks) for part in model.modules()]
    xpatch.optimize(xpatch.optimize(model))  # twice is once
    near(model(token_ids).logits, expected)
    xpatch.optimize(model, off=True)
    assert torch.equal(model(token_ids).logits, expected)
    assert hooks == [len(part._forward_hooks) for part in model.modules()]
    assert xpatch.optimize(model, off=True) is model


@torch.no_grad()
def test_removing_everything_undoes_it(lively, token_ids, patch_of):
    model = lively("bert")
    base = model(token_ids).logits
    xpatch.apply(xpatch.optimize(model), patch_of(model, "neurons"), name="a")
    xpatch.remove(model, "a")
    assert xpatch.status(model).optimized == "first"
    xpatch.remove(model)
    assert runtime_of(model) is None and torch.equal(model(token_ids).logits, base)


@torch.no_grad()
def test_rows_are_taken_without_patches(lively, token_ids):
    model = xpatch.optimize(lively("bert"))
    near(model(token_ids, xpatch=xpatch.Rows(languages="en")).logits, model(token_ids).logits)


@torch.no_grad()
def test_firings_count_the_head_token(lively, token_ids, patch_of):
    full = xpatch.apply(lively("bert"), patch_of(lively("bert"), "neurons"), name="a")
    model = xpatch.optimize(copy.deepcopy(full))
    for one in (full, model):
        xpatch.status(one, count=True)
        one(token_ids, xpatch=xpatch.Rows(languages=["en", "de", "de"]))
    assert xpatch.status(full).parts[0].fired == xpatch.status(model).parts[0].fired > 0
    found, expected = xpatch.firings(model).to_dict(), xpatch.firings(full).to_dict()
    assert found["entries"] == expected["entries"]


@torch.no_grad()
def test_status_says_so(lively, patch_of):
    model = lively("gpt2")
    assert xpatch.status(model).optimized is None and xpatch.status(xpatch.optimize(model)).optimized == "last"
    line = "optimised: the last layer computes the last token alone"
    assert str(xpatch.status(model)) == f"no patches applied\n{line}"
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    assert line in str(xpatch.status(model)) and xpatch.status(model).to_dict()["optimized"] == "last"


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_are_optimised_and_go_their_own_way(lively, token_ids, patch_of, family, clone):
    model = lively(family)
    base = model(token_ids).logits
    xpatch.apply(xpatch.optimize(model), patch_of(model, "neurons"), name="a")
    expected = model(token_ids).logits
    other = clone(model)
    assert torch.equal(other(token_ids).logits, expected) and xpatch.status(other).optimized
    xpatch.optimize(model, off=True)
    xpatch.remove(model)
    assert torch.equal(other(token_ids).logits, expected) and torch.equal(model(token_ids).logits, base)
    xpatch.remove(other)
    assert torch.equal(other(token_ids).logits, base) and runtime_of(other) is None
    part = copy.deepcopy(xpatch.optimize(model).base_model)
    assert torch.equal(part(token_ids)[0], model.base_model(token_ids)[0])


def test_a_saved_model_is_the_plain_one(lively, token_ids, tmp_path):
    model = lively("bert")
    expected, names = model(token_ids).logits, list(model.state_dict())
    xpatch.optimize(model).save_pretrained(tmp_path)
    assert list(model.state_dict()) == names
    found = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(found(token_ids).logits, expected) and runtime_of(found) is None


@torch.no_grad()
def test_threads_while_it_is_switched(lively, token_ids, patch_of):
    torch.set_num_threads(1)
    model = lively("bert")
    xpatch.apply(model, patch_of(model, "neurons"), name="a")
    batches = [token_ids, token_ids[:2], token_ids[:, :4], token_ids[:1]]
    expected = [model(ids).logits for ids in batches]
    failures, stop = [], threading.Event()

    def infer(start):
        try:
            with torch.no_grad():
                turn = start
                while not stop.is_set():
                    turn = (turn + 1) % len(batches)
                    near(model(batches[turn]).logits, expected[turn])
                    model.bert(batches[turn])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=infer, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(100):
        xpatch.optimize(model, off=bool(turn % 2))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert xpatch.status(model).optimized is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_checkpointed_by_hand(lively, token_ids, reentrant):
    """Its second computation happens outside of the model's call, where every row is computed."""
    model = lively("bert").double()
    model(token_ids).logits.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    layer = xpatch.optimize(model).bert.encoder.layer[1]
    inner = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: checkpoint(
        lambda x: inner(x, *args, **kwargs), hidden, use_reentrant=reentrant
    )
    model(token_ids).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-9, rtol=1e-6, msg=name)


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind(lively, token_ids):
    model = lively("bert")
    whole = model.bert(token_ids)[0]
    xpatch.optimize(model)
    handle = model.bert.pooler.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(token_ids)
    handle.remove()
    assert torch.equal(model.bert(token_ids)[0], whole)


@torch.no_grad()
def test_replicas_of_data_parallelism(lively, token_ids):
    """Each computes with its own modules, as `torch.nn.parallel.replicate` makes them."""
    model = lively("bert")
    expected = model(token_ids).logits
    xpatch.optimize(model)
    replicas, seen = {}, []
    for name, module in reversed(list(model.named_modules())):
        replica = module._replicate_for_data_parallel()
        replica._parameters = dict(module._parameters)
        for child in module._modules:
            replica._modules[child] = replicas[f"{name}.{child}" if name else child]
        replicas[name] = replica
    replicas["bert.encoder.layer.1.output.dense"].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    near(replicas[""](token_ids).logits, expected)
    assert seen == [(3, 1, 64)]
