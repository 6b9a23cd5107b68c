"""PEFT adapters and patches on one model, in either order: both act, each comes off by itself, and a set still knows its base."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import xpatch
from xpatch.patches.identity import identify
from xpatch.runtime.attach import runtime_of
from xpatch.runtime.hooks import Hook

peft = pytest.importorskip("peft")

TASKS = {"bert": "SEQ_CLS", "gpt2-lm": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield


def lora(family, **more):
    options = {"target_modules": "all-linear", "init_lora_weights": False, "r": 2, **more}
    return peft.LoraConfig(task_type=TASKS[family], **options)


def weights_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("family", TASKS)
def test_either_order_gives_one_model(tiny, token_ids, sets_for, patched, side_path, logits, no_trace, family):
    base = tiny(family)
    sets = sets_for(base)
    first = patched(copy.deepcopy(base), sets)
    torch.manual_seed(3)
    first = peft.get_peft_model(first, lora(family)).eval()  # patched, then wrapped
    torch.manual_seed(3)
    second = patched(peft.get_peft_model(copy.deepcopy(base), lora(family)).eval(), sets)  # wrapped, then patched
    both = logits(first, token_ids)
    torch.testing.assert_close(logits(second, token_ids), both, **CLOSE)
    with xpatch.disabled(first):
        adapted = logits(first, token_ids)
    assert (both - adapted).abs().max() > 1e-2 and (adapted - logits(base, token_ids)).abs().max() > 1e-2

    for model in (first, second):  # without the adapters the patches are what is left
        with model.disable_adapter():
            side = logits(side_path(base, sets), token_ids).float()
            torch.testing.assert_close(logits(model, token_ids), side, atol=1e-3, rtol=1e-3)
        xpatch.remove(model)
        assert runtime_of(model) is None
        assert torch.equal(logits(model, token_ids), adapted)
        no_trace(model.unload(), base, token_ids)


@torch.no_grad()
@pytest.mark.parametrize("family", TASKS)
def test_rows_pass_through_a_peft_model(tiny, token_ids, sets_for, patched, logits, family):
    model = patched(peft.get_peft_model(tiny(family), lora(family)).eval(), sets := sets_for(tiny(family), base=False))
    everything = logits(model, token_ids)
    with xpatch.disabled(model):
        nothing = logits(model, token_ids)
    choice = xpatch.Rows(patches=["neurons", "__base__", list(sets)])
    mixed = logits(model, token_ids, xpatch=choice)
    assert torch.equal(mixed[1], nothing[1]) and torch.equal(mixed[2], everything[2])
    assert not torch.equal(mixed[0], nothing[0]) and not torch.equal(mixed[0], everything[0])
    with pytest.raises(xpatch.MismatchError, match="2 entries but the batch has 3 rows"):
        logits(model, token_ids, xpatch=xpatch.Rows(patches=["neurons", "deltas"]))
    if family == "bert":
        return
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(token_ids)}
    texts = model.generate(input_ids=token_ids, **options)
    with xpatch.disabled(model):
        plain = model.generate(input_ids=token_ids, **options)
    some = model.generate(input_ids=token_ids, xpatch=choice, **options)
    assert not torch.equal(texts, plain)
    assert torch.equal(some[1], plain[1]) and torch.equal(some[2], texts[2])


@torch.no_grad()
def test_a_forward_called_past_the_model_takes_rows_too(tiny, token_ids, sets_for, patched):
    """Older versions of PEFT call `model.forward(...)`, which runs no hooks of the model, only those of its parts."""
    model = tiny("bert")
    patched(model, sets_for(model))
    everything = model.forward(token_ids).logits
    with xpatch.disabled(model):
        nothing = model.forward(token_ids).logits
    mixed = model.forward(token_ids, xpatch=xpatch.Rows(patches=["__base__", None, "neurons"])).logits
    assert torch.equal(everything, model(token_ids).logits) and not torch.equal(everything, nothing)
    assert torch.equal(mixed[0], nothing[0]) and torch.equal(mixed[1], everything[1])


@pytest.mark.parametrize("family", TASKS)
def test_the_identity_is_the_bases_whatever_adapters_are_there(tiny, family):
    model = tiny(family)
    site = [site.name for site in xpatch.models.anatomy.find_ffn_sites(model)]
    before = identify(model, site=site)
    assert identify(peft.get_peft_model(model, lora(family)), site=site) == before
    assert identify(model, site=site) == before  # the adapters are inside it now


def test_all_kinds_of_adapters_leave_the_identity_alone(tiny, sets_for):
    configs = {
        "dora": lora("bert", use_dora=True),
        "with a head": lora("bert", modules_to_save=["classifier"]),
        "half precision": lora("bert"),
        "ia3": peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]
        ),
        "tokens": lora("bert", trainable_token_indices={"word_embeddings": [1, 2]}),
        "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        "prefix": peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        "layer norms": peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
        "loha": peft.LoHaConfig(task_type="SEQ_CLS", target_modules=["dense"]),
        "boft": peft.OFTConfig(task_type="SEQ_CLS", target_modules=["dense"], oft_block_size=4),
    }
    base = tiny("bert")
    sets = sets_for(base)
    for kind, config in configs.items():
        model = peft.get_peft_model(copy.deepcopy(base), config)
        if kind == "half precision":
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.bfloat16()
        assert identify(model) == identify(base), kind
        xpatch.apply(model, sets["deltas"], name="a")
        xpatch.remove(model)


def test_two_adapters_and_those_of_transformers_itself(tiny, token_ids, sets_for, patched, logits, no_trace):
    base = tiny("bert")
    sets = sets_for(base)
    model = copy.deepcopy(base)
    model.add_adapter(lora("bert"), "one")
    model.add_adapter(lora("bert", target_modules=["query"]), "two")
    patched(model, sets)
    alone = patched(copy.deepcopy(base), sets)
    with torch.no_grad():
        answers = []
        for adapter in ("one", "two"):
            model.set_adapter(adapter)
            model.eval()
            answers.append(logits(model, token_ids))
        model.disable_adapters()
        torch.testing.assert_close(logits(model, token_ids), logits(alone, token_ids), **CLOSE)
    assert not torch.equal(*answers)
    xpatch.remove(model)
    with torch.no_grad():
        assert torch.equal(logits(model, token_ids), logits(base, token_ids))
    no_trace(alone, base, token_ids)


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("known", ["never", "before wrapping", "wrapped"])
def test_a_merged_adapter_is_another_base(tiny, sets_for, known, unload):
    model = tiny("bert")
    sets = sets_for(model)
    if known == "before wrapping":  # the same model was found to fit
        xpatch.remove(xpatch.apply(model, sets["neurons"], name="a"))
    model = peft.get_peft_model(model, lora("bert"))
    if known == "wrapped":
        xpatch.remove(xpatch.apply(model, sets["neurons"], name="a"))
    if unload:
        model = model.merge_and_unload()
    else:
        model.merge_adapter()
    with pytest.raises(xpatch.MismatchError, match=r"weights of layer bert\.encoder\.layer\.0"):
        xpatch.apply(model, sets["neurons"], name="a")
    assert runtime_of(model) is None


@torch.no_grad()
def test_patches_stay_when_adapters_come_and_go(tiny, token_ids, sets_for, patched, logits, no_trace):
    """Wrapping and unloading put other modules where the patched ones were."""
    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model)
    before = logits(patched(model, sets), token_ids)
    wrapped = peft.get_peft_model(model, lora("bert")).eval()
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped, token_ids), before, **CLOSE)
    xpatch.remove(wrapped)
    patched(wrapped, sets)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped, token_ids), before, **CLOSE)
    model = wrapped.unload()
    torch.testing.assert_close(logits(model, token_ids), before, **CLOSE)
    no_trace(model, base, token_ids)


@torch.no_grad()
@pytest.mark.parametrize("patch_first", [True, False])
def test_adapters_that_do_not_call_their_base_layer(tiny, token_ids, sets_for, patched, logits, patch_first):
    base = tiny("bert")
    sets = sets_for(base)
    config = peft.HRAConfig(task_type="SEQ_CLS", target_modules=["dense"], init_weights=False, r=2)
    model = copy.deepcopy(base)
    if patch_first:
        patched(model, sets)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config).eval()
    if not patch_first:
        patched(model, sets)
    found = logits(model, token_ids)
    with xpatch.disabled(model):
        adapted = logits(model, token_ids)
    assert (found - adapted).abs().max() > 1e-2
    assert torch.equal(logits(xpatch.remove(model), token_ids), adapted)
    patched(model, sets)
    torch.testing.assert_close(logits(model, token_ids), found, **CLOSE)


def test_an_adapter_is_saved_without_patches_and_trained_beside_them(tiny, token_ids, tmp_path, sets_for, patched):
    base = tiny("bert")
    sets = sets_for(base)
    torch.manual_seed(3)
    plain = peft.get_peft_model(copy.deepcopy(base), lora("bert"))
    torch.manual_seed(3)
    model = patched(peft.get_peft_model(copy.deepcopy(base), lora("bert")), sets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.save_pretrained(tmp_path / "plain")
        model.save_pretrained(tmp_path / "patched")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "patched" / path.name).read_bytes()
    assert len(list((tmp_path / "patched").iterdir())) == len(list((tmp_path / "plain").iterdir()))

    before = weights_of(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(token_ids, labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    xpatch.remove(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lora_" in name for name in trained)
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    after = weights_of(model.unload())
    assert all(torch.equal(after[key], before[key]) for key in before if not key.startswith("classifier."))


@torch.no_grad()
def test_a_patched_layer_that_is_gone_is_told(tiny, token_ids, sets_for, patched, logits):
    model = tiny("bert")
    patched(model, sets_for(model))
    taken = model.bert.encoder.layer[1].output.dense
    del model.bert.encoder.layer[1].output.dense
    with pytest.raises(xpatch.ConflictError, match="is not there any more"):
        logits(model, token_ids)
    model.bert.encoder.layer[1].output.dense = taken
    logits(model, token_ids)


@torch.no_grad()
@pytest.mark.parametrize("patch_first", [True, False])
def test_a_patched_head_that_peft_trains_a_copy_of(tiny, token_ids, logits, patch_first):
    model = tiny("bert")
    base = copy.deepcopy(model)
    delta = xpatch.LowRankDelta("classifier", torch.randn(3, 32), torch.randn(2, 3))
    patches = xpatch.PatchSet({"head": delta}, base=identify(model, site="classifier"))
    if patch_first:
        xpatch.apply(model, patches, name="head")
    wrapped = peft.get_peft_model(model, lora("bert", target_modules=["query"], modules_to_save=["classifier"])).eval()
    if not patch_first:
        xpatch.apply(wrapped, patches, name="head")
    wrapped.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    found = logits(wrapped, token_ids)
    with xpatch.disabled(wrapped):
        trained = logits(wrapped, token_ids)
    hidden = wrapped.base_model.model.bert(token_ids).pooler_output
    torch.testing.assert_close(found, trained + hidden @ delta.down.T @ delta.up.T, **CLOSE)  # once, not twice
    assert torch.equal(logits(xpatch.remove(wrapped), token_ids), trained)
    assert torch.equal(wrapped.base_model.model.classifier.original_module.weight, base.classifier.weight)
    hooks = [
        hook for module in wrapped.modules() for hook in (module._forward_hooks | module._forward_pre_hooks).values()
    ]
    assert not any(isinstance(hook, Hook) for hook in hooks)
