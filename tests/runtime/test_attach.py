from __future__ import annotations

import threading

import pytest
import torch

import xpatch
from xpatch.runtime.attach import runtime_of


def state_of(model):
    """Everything on the model that a hook or an attribute could change."""
    return [
        (
            name,
            [key for key in vars(module) if not key.startswith("_")],
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


@torch.no_grad()
def test_one_call_sees_one_state_even_if_it_changes_on_the_way(tiny, token_ids, patch_of):
    model = tiny("bert")
    base = model(token_ids).logits
    first = xpatch.PatchSet(
        parts={"x": patch_of(model, "neurons", layer=0).parts["part"], "y": patch_of(model, "neurons").parts["part"]}
    )
    clean = state_of(model)
    xpatch.apply(model, first, name="a")
    patched = model(token_ids).logits
    middle = model.bert.encoder.layer[0].output.LayerNorm.register_forward_hook(
        lambda *ignored: xpatch.remove(model) and None
    )
    assert torch.equal(model(token_ids).logits, patched)
    middle.remove()
    assert state_of(model) == clean  # the call that was running took the hooks down when it ended
    # The first apply in the middle of a call: that call stays unpatched at every layer.
    middle = model.bert.encoder.layer[0].attention.output.register_forward_hook(
        lambda *ignored: xpatch.apply(model, first, name="a") and None
    )
    assert torch.equal(model(token_ids).logits, base)
    middle.remove()
    assert torch.equal(model(token_ids).logits, patched)


@torch.no_grad()
def test_generate_sees_one_state(tiny, token_ids, patch_of):
    model = tiny("gpt2-lm")
    patches = patch_of(model, "neurons")
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(token_ids)}
    base = model.generate(token_ids, **options)
    steps = []

    def at_step_two(change):
        def hook(*ignored):
            steps.append(0)
            if len(steps) == 2:
                change()

        steps.clear()
        return model.lm_head.register_forward_hook(hook)

    handle = at_step_two(lambda: xpatch.apply(model, patches, name="a"))
    assert torch.equal(model.generate(token_ids, **options), base)
    handle.remove()
    patched = model.generate(token_ids, **options)
    assert not torch.equal(patched, base)
    handle = at_step_two(lambda: xpatch.remove(model))
    assert torch.equal(model.generate(token_ids, **options), patched)
    handle.remove()
    assert "generate" not in vars(model) and runtime_of(model) is None
    assert torch.equal(model.generate(token_ids, **options), base)


@torch.no_grad()
def test_a_failing_call_lets_go_of_its_state(tiny, token_ids, patch_of):
    model = tiny("bert")
    base = model(token_ids).logits
    xpatch.apply(model, patch_of(model, "neurons"))
    with pytest.raises(IndexError):
        model(token_ids + 1000)

    def failing(*ignored):
        raise RuntimeError("between up and down")

    handle = model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="between up and down"):
        model(token_ids)
    handle.remove()
    runtime = runtime_of(model)
    assert not runtime._active and not runtime._thread.pins
    assert all(slot.x is None for slot in runtime._slots.values())
    xpatch.remove(model)
    assert runtime_of(model) is None and torch.equal(model(token_ids).logits, base)


@torch.no_grad()
def test_a_part_called_alone_sees_what_is_published(tiny, token_ids, patch_of):
    model = tiny("bert")
    base = model.bert(token_ids).last_hidden_state
    xpatch.apply(model, patch_of(model, "neurons"))
    patched = model.bert(token_ids).last_hidden_state
    hidden = torch.randn(2, 3, 32)
    layer = model.bert.encoder.layer[1]
    assert not torch.equal(patched, base)
    with xpatch.disabled(model):
        assert torch.equal(model.bert(token_ids).last_hidden_state, base)
        alone = layer.output.dense(layer.intermediate(hidden))
    assert not torch.equal(layer.output.dense(layer.intermediate(hidden)), alone)
    assert torch.equal(model.bert(token_ids).last_hidden_state, patched)


@torch.no_grad()
@pytest.mark.parametrize("other", ["base", "set"])
def test_threads_see_only_published_states(tiny, token_ids, patch_of, other):
    model = tiny("bert")

    def at_both_layers(seed):
        parts = {
            str(layer): patch_of(model, "neurons", seed=seed + layer, layer=layer).parts["part"] for layer in (0, 1)
        }
        return xpatch.PatchSet(parts=parts)

    def one():
        xpatch.apply(model, at_both_layers(10), name="a")

    def two():
        if other == "set":
            xpatch.apply(model, at_both_layers(20), name="a")
        else:
            xpatch.remove(model)

    states = set()
    for change in (one, two):
        change()
        states.add(tuple(model(token_ids).logits.flatten().tolist()))
    assert len(states) == 2
    seen: list[set] = [set(), set()]
    failures: list[BaseException] = []
    stop = threading.Event()

    def infer(index):
        try:
            with torch.no_grad():
                while not stop.is_set():
                    seen[index].add(tuple(model(token_ids).logits.flatten().tolist()))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=infer, args=(index,)) for index in range(2)]
    torch.set_num_threads(1)
    for thread in threads:
        thread.start()
    for turn in range(200):
        (one, two)[turn % 2]()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert seen[0] | seen[1] <= states
    xpatch.remove(model)
    assert runtime_of(model) is None


@torch.no_grad()
def test_disabled_and_rows_hold_for_one_thread_only(tiny, token_ids, patch_of):
    model = tiny("bert")
    xpatch.apply(model, patch_of(model, "neurons"))
    patched = model(token_ids).logits
    inside, asked = threading.Event(), threading.Event()

    def elsewhere():
        with xpatch.disabled(model):
            inside.set()
            asked.wait(30)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert inside.wait(30)
    assert torch.equal(model(token_ids).logits, patched)
    asked.set()
    thread.join()


@torch.no_grad()
def test_an_encoder_decoder_generates_from_one_state(token_ids):
    import transformers as hf

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    base = model.generate(token_ids, **options)
    sites = ("encoder.block.0.layer.1.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense")
    parts = {
        str(index): xpatch.PatchNeurons(site, torch.randn(4, 32), torch.ones(4), torch.randn(4, 32), "relu")
        for index, site in enumerate(sites)
    }
    xpatch.apply(model, xpatch.PatchSet(parts=parts), name="a")
    patched = model.generate(token_ids, **options)
    assert not torch.equal(patched, base)
    mixed = model.generate(token_ids, xpatch=xpatch.Rows(patches=["a", "__base__", "a"]), **options)
    assert torch.equal(mixed[1], base[1]) and torch.equal(mixed[0], patched[0])
    assert torch.equal(xpatch.remove(model).generate(token_ids, **options), base)
