"""Plain checkpoints and PEFT adapters: loaded without xpatch they answer as the patched model does."""

from __future__ import annotations

import json

import pytest
import torch

import xpatch
from xpatch.exporters import export_merged, export_peft, export_widened
from xpatch.models.anatomy import final_ffn, find_ffn_sites, linear_shape
from xpatch.patches.identity import identify

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 60, "initializer_range": 0.2}
BERT = {
    **SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": 2}


def make(kind: str):
    torch.manual_seed(0)
    t = transformers
    return {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)),
        "xlmr": lambda: t.XLMRobertaForSequenceClassification(t.XLMRobertaConfig(**BERT, type_vocab_size=1, num_labels=3)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(**SMALL, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=40)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=40)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=40, word_embed_proj_dim=32, init_std=0.2)
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4)),
    }[kind]().eval()  # fmt: skip


def neurons(model, count: int = 5, site=None, activation=None):
    site = site or final_ffn(model)
    name = activation or site.activation
    return xpatch.PatchNeurons(
        site=site.name, keys=torch.randn(count, site.width), bias=torch.randn(count) / 2, values=torch.randn(count, site.width),
        activation=name,
    )  # fmt: skip


def delta(model, rank: int = 3, name=None, **more):
    name = name or final_ffn(model).down
    inside, outside = linear_shape(model.get_submodule(name))
    return xpatch.LowRankDelta(site=name, down=torch.randn(rank, inside) / 4, up=torch.randn(outside, rank) / 4, **more)


def patch_set(model, **parts):
    return xpatch.PatchSet(parts=parts, base=identify(model, site=[part.site for part in parts.values()]))


def logits(model):
    tokens = torch.arange(2 * 9).view(2, 9) * 7 % 55 + 3
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def patched(model, patches):
    xpatch.apply(model, patches, name="p")
    found = logits(model)
    xpatch.remove(model)
    return found


@pytest.mark.parametrize("kind", ["bert", "xlmr", "distilbert", "gpt2", "opt"])
def test_a_widened_checkpoint_answers_as_the_patched_model(kind, tmp_path):
    model = make(kind)
    first, last = find_ffn_sites(model)[0], final_ffn(model)
    patches = patch_set(model, a=neurons(model, 5), b=neurons(model, 2), c=neurons(model, 1, first), d=delta(model))
    before, expected = logits(model), patched(model, patches)
    assert not torch.allclose(before, expected, atol=1e-3)
    folder = export_widened(model, patches, tmp_path / "out", multiple=16)
    again = type(model).from_pretrained(folder).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    widths = {site.inner for site in find_ffn_sites(again)}
    assert widths == {-(-(last.inner + 7) // 16) * 16}
    assert torch.equal(logits(model), before)  # the model is left as it was
    note = json.loads((folder / "xpatch_export.json").read_text())
    assert note["kind"] == "widened" and note["fingerprint"] == patches.fingerprint


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "bloom"])
def test_a_merged_checkpoint_answers_as_the_patched_model(kind, tmp_path):
    model = make(kind)
    other = find_ffn_sites(model)[0].up
    inside, outside = linear_shape(model.get_submodule(other))
    bias = torch.randn(outside) if getattr(model.get_submodule(other), "bias", None) is not None else None
    dense = xpatch.DenseDelta(site=other, weight=torch.randn(outside, inside) / 8, bias=bias)
    patches = patch_set(model, a=delta(model), b=delta(model, 1), c=dense)
    before, expected = logits(model), patched(model, patches)
    folder = export_merged(model, patches, tmp_path / "out")
    again = type(model).from_pretrained(folder).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)
    untouched = {name for name in model.state_dict() if not name.startswith((other, final_ffn(model).down))}
    mine, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in untouched)


def test_half_weights_are_rounded_once(tmp_path):
    model = make("llama").to(torch.bfloat16)
    patches = patch_set(model, a=delta(model), b=delta(model))
    folder = export_merged(model, patches, tmp_path / "out")
    name = final_ffn(model).down
    old = model.get_submodule(name).weight.detach().float()
    sums = old
    for part in patches.parts.values():
        sums = sums + part.up @ part.down
    again = type(model).from_pretrained(folder, dtype="auto")
    assert torch.equal(again.get_submodule(name).weight, sums.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_peft_adapter_answers_as_the_patched_model(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = make(kind)
    up = find_ffn_sites(model)[0].up
    patches = patch_set(model, a=delta(model, 3), b=delta(model, 2), c=delta(model, 1, up))
    expected = patched(model, patches)
    folder = export_peft(patches, tmp_path / "adapter", base_model="my-model")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my-model" and config["r"] == 5 == config["lora_alpha"]
    found = peft.PeftModel.from_pretrained(model, folder).eval()
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    model = make("bert")
    activation = "relu" if final_ffn(model).activation != "relu" else "gelu"
    mask = xpatch.LanguageMask(("en", "de"), torch.ones(2, 48), torch.ones(2, 32))
    masked = xpatch.PatchSet(parts={"a": delta(model, mask="m")}, masks={"m": mask})
    sets = {"empty": xpatch.PatchSet(parts={}), "masked": masked, "neurons": patch_set(model, a=neurons(model))}
    cases = [
        (lambda out: export_merged(model, sets["neurons"], out), xpatch.MismatchError, "widened"),
        (lambda out: export_merged(model, sets["empty"], out), xpatch.MismatchError, "nothing to export"),
        (lambda out: export_merged(model, masked, out), xpatch.ConflictError, "language mask 'm'"),
        (lambda out: export_peft(sets["neurons"], out), xpatch.MismatchError, "low-rank deltas alone"),
        (lambda out: export_peft(masked, out), xpatch.ConflictError, "fold_language"),
        (lambda out: export_widened(model, patch_set(model, a=delta(model)), out), xpatch.MismatchError, "no patch neurons"),
        (
            lambda out: export_widened(model, patch_set(model, a=neurons(model, activation=activation)), out),
            xpatch.MismatchError, f"activation is '{activation}'",
        ),
    ]  # fmt: skip
    for make_it, error, words in cases:
        with pytest.raises(error, match=words):
            make_it(tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_widened_say_why(tmp_path):
    llama, bloom = make("llama"), make("bloom")
    site = final_ffn(llama)
    with pytest.raises(xpatch.MismatchError, match="gated"):
        export_widened(llama, patch_set(llama, a=neurons(llama, site=site)), tmp_path / "out")
    with pytest.raises(xpatch.MismatchError, match="no setting of its configuration|activation"):
        export_widened(bloom, patch_set(bloom, a=neurons(bloom)), tmp_path / "out")
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=60, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    )
    with pytest.raises(xpatch.MismatchError, match="has no bias"):
        export_widened(t5, patch_set(t5, a=neurons(t5)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_shared_weight_and_a_patched_model_are_refused(tmp_path):
    model = make("gpt2")
    with pytest.raises(xpatch.MismatchError, match="same tensor"):
        export_merged(model, patch_set(model, a=delta(model, name="lm_head")), tmp_path / "out")
    patches = patch_set(model, a=delta(model))
    xpatch.apply(model, patches)
    with pytest.raises(xpatch.ConflictError, match="patches applied"):
        export_merged(model, patches, tmp_path / "out")


def test_a_folder_of_something_else_stays(tmp_path):
    model = make("bert")
    patches = patch_set(model, a=delta(model))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(xpatch.XpatchError, match="files of something else"):
        export_merged(model, patches, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]
    for _ in range(2):  # an export of our own is replaced
        export_peft(patches, tmp_path / "adapter")


def spoil_widened(monkeypatch):
    from xpatch.exporters.checkpoints import widened

    whole = widened._weights

    def last_neuron_lost(model, parts, sites, wider, width):
        weights = whole(model, parts, sites, wider, width)
        last = final_ffn(model).inner + sum(part.count for part in wider[sites[-1].name]) - 1
        weights[f"{sites[-1].up}.bias"][last] = -1e4
        return weights

    monkeypatch.setattr(widened, "_weights", last_neuron_lost)


def spoil_merged(monkeypatch):
    from xpatch.exporters.checkpoints.files import WeightFiles

    change = WeightFiles.change
    monkeypatch.setattr(WeightFiles, "change", lambda self, name, how: change(self, name, lambda w: w - (how(w) - w)))


@pytest.mark.parametrize(
    ("export", "make_part", "spoil"),
    [(export_widened, neurons, spoil_widened), (export_merged, delta, spoil_merged)],
    ids=["widened", "merged"],
)
def test_a_checkpoint_that_answers_otherwise_is_not_put_in_place(export, make_part, spoil, tmp_path, monkeypatch):
    model = make("bert")
    patches = patch_set(model, a=make_part(model))
    before, out = logits(model), tmp_path / "out"
    export(model, patches, out)
    good = {path.name: path.read_bytes() for path in out.iterdir()}
    spoil(monkeypatch)
    with pytest.raises(
        xpatch.BackendError, match="does not compute what the patched Bert.*logits differ by .*nothing was put in place"
    ):
        export(model, patches, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == good
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(logits(model), before) and not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )
    export(model, patches, out, check=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} != good


def test_neurons_that_are_silent_on_every_text_are_compared_too(tmp_path, monkeypatch):
    """Trained neurons fire on their edit's texts alone: random tokens would see nothing of a lost one."""
    model = make("opt")  # its FFN has a ReLU
    quiet = neurons(model, 3)
    quiet = xpatch.PatchNeurons(
        site=quiet.site, keys=quiet.keys, bias=quiet.bias - 100, values=quiet.values, activation="relu"
    )
    patches = patch_set(model, a=quiet)
    torch.testing.assert_close(patched(model, patches), logits(model), rtol=0, atol=0)
    export_widened(model, patches, tmp_path / "out")
    spoil_widened(monkeypatch)
    with pytest.raises(xpatch.BackendError, match="logits differ"):
        export_widened(model, patches, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["t5", "bart", "vision"])
def test_models_with_a_decoder_are_compared_and_those_without_tokens_say_how_to_go_on(kind, tmp_path, monkeypatch):
    t = transformers
    torch.manual_seed(0)
    if kind == "t5":
        model = t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=60, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
        )
    elif kind == "bart":
        model = t.BartForSequenceClassification(
            t.BartConfig(
                vocab_size=60,
                d_model=32,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                max_position_embeddings=40,
            )
        )
    else:
        model = t.ViTForImageClassification(
            t.ViTConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=8,
            )
        )
    model.eval()
    if kind == "vision":
        patches = patch_set(model, a=neurons(model))
        with pytest.raises(xpatch.BackendError, match=r"takes pixel_values, not input_ids.*check=False"):
            export_widened(model, patches, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        export_widened(model, patches, tmp_path / "out", check=False)
        return
    patches = patch_set(model, a=delta(model))
    export_merged(model, patches, tmp_path / "out")
    spoil_merged(monkeypatch)
    with pytest.raises(xpatch.BackendError, match="does not compute"):
        export_merged(model, patches, tmp_path / "other")
