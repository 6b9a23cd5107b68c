"""Which model a set fits: exact digests in three precisions, one relaxation at a time, cached and invalidated."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch

from xpatch.errors import MismatchError
from xpatch.patches import digests
from xpatch.patches.identity import CHECKS, BaseIdentity, check_fit, first_difference, identify, tokenizer_digest
from xpatch.patches.types import DenseDelta, PatchNeurons, PatchSet

SITE = "bert.encoder.layer.1"


def for_base(model: torch.nn.Module, tokenizer: Any = None, site: str = SITE) -> PatchSet:
    part = PatchNeurons(site, torch.ones(1, 8), torch.ones(1), torch.ones(1, 8), "relu")
    return PatchSet({"p": part}, base=identify(model, tokenizer, site=site))


class Tokenizer:
    """A stand-in that numbers characters."""

    def __init__(self, vocabulary: dict[str, int] | None = None, shift: int = 0) -> None:
        self.vocabulary, self.shift = vocabulary or {"a": 0}, shift

    def __len__(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, *texts: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) + self.shift for text in texts for letter in text]}


def test_description(bert: torch.nn.Module) -> None:
    identity = identify(bert, site=[f"{SITE}.output.dense", "classifier"])
    assert (identity.architecture, identity.width, identity.layers) == ("BertForSequenceClassification", 8, 2)
    assert (identity.activation, identity.dtype, identity.origin) == ("gelu", "float32", None)
    assert identity.id2label == {0: "REFUTES", 1: "SUPPORTS"} and identity.num_labels == 2
    assert set(identity.touched) == {SITE, "classifier"} and identity.tokenizer is None
    assert BaseIdentity.model_validate_json(identity.model_dump_json()) == identity
    with pytest.raises(MismatchError, match="site: expected a module 'bert.encoder.layer.9', found none"):
        identify(bert, site="bert.encoder.layer.9")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_trained_in_fp32_fits_served_in_any_precision(bert: torch.nn.Module, dtype: torch.dtype) -> None:
    check_fit(for_base(bert), copy.deepcopy(bert).to(dtype))
    check_fit(for_base(copy.deepcopy(bert).to(dtype)), bert)


def test_partly_converted_models_fit(bert: torch.nn.Module) -> None:
    mixed = copy.deepcopy(bert).to(torch.bfloat16)
    for module in mixed.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    check_fit(for_base(bert), mixed)


def test_other_weights_in_low_precision_are_still_noticed(bert: torch.nn.Module) -> None:
    served = copy.deepcopy(bert).to(torch.bfloat16)
    with torch.no_grad():
        served.bert.embeddings.word_embeddings.weight[3, 0] += 0.5
    with pytest.raises(
        MismatchError, match=r"the patches do not fit this model: weights in bf16: expected \w{12}, found \w{12}"
    ):
        check_fit(for_base(bert), served)
    with pytest.raises(MismatchError, match="float16 and bfloat16 weights rarely compare equal"):
        check_fit(for_base(copy.deepcopy(bert).half()), copy.deepcopy(bert).bfloat16())


def changed(bert: torch.nn.Module, name: str) -> torch.nn.Module:
    other = copy.deepcopy(bert)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[0] += 1
    return other


@pytest.mark.parametrize(
    ("name", "check", "told"),
    [
        ("classifier.weight", "head", "weights of the head in fp32"),
        ("bert.pooler.dense.bias", "head", "weights of the head in fp32"),
        (f"{SITE}.output.dense.weight", "layer", f"weights of layer {SITE} in fp32"),
        ("bert.encoder.layer.0.output.dense.weight", "all_weights", "weights in fp32"),
    ],
)
def test_first_difference_is_named_and_relaxed_alone(bert: torch.nn.Module, name: str, check: str, told: str) -> None:
    patches, other = for_base(bert), changed(bert, name)
    with pytest.raises(MismatchError, match=rf"{told}: expected \w{{12}}, found \w{{12}}; .* \(allow=\('{check}',\)"):
        check_fit(patches, other)
    check_fit(patches, other, allow=(check, "all_weights") if check == "layer" else (check,))
    relaxed = [each for each in CHECKS if each not in (check, "all_weights")]
    with pytest.raises(MismatchError):
        check_fit(patches, other, allow=relaxed)


def test_a_free_head_does_not_free_the_rest(bert: torch.nn.Module) -> None:
    other = changed(changed(bert, "classifier.weight"), "bert.encoder.layer.0.output.dense.weight")
    with pytest.raises(MismatchError, match="weights outside the head in fp32"):
        check_fit(for_base(bert), other, allow=("head",))
    check_fit(for_base(bert), other, allow=("head", "all_weights"))


def test_description_is_compared(bert: torch.nn.Module) -> None:
    patches = for_base(bert)
    swapped = copy.deepcopy(bert)
    swapped.config.id2label = {0: "SUPPORTS", 1: "REFUTES"}
    with pytest.raises(
        MismatchError, match=r"labels: expected .*REFUTES.*, found .*SUPPORTS.*; give the model the labels"
    ):
        check_fit(patches, swapped)
    check_fit(patches, swapped, allow=("labels",))
    for field, value in {"width": 9, "layers": 7, "activation": "relu", "architecture": "Other"}.items():
        found = identify(bert).model_copy(update={field: value})
        assert patches.base is not None
        difference = first_difference(patches.base, found)
        assert difference is not None and difference.startswith(f"{field}: expected") and str(value) in difference
        assert first_difference(patches.base, found, allow=(field,)) is None
    with pytest.raises(MismatchError, match=r"allow: expected checks among architecture, .* found 'heads'"):
        check_fit(patches, bert, allow=("heads",))


def test_missing_sites_are_named(bert: torch.nn.Module) -> None:
    hand_made = PatchSet({"p": DenseDelta("transformer.h.0.mlp", torch.ones(2, 2))})
    with pytest.raises(
        MismatchError, match=r"part 'p': expected a module 'transformer.h.0.mlp', found none in BertFor"
    ):
        check_fit(hand_made, bert)
    check_fit(PatchSet({"p": DenseDelta("classifier", torch.ones(2, 8))}), bert)


def test_tokenizers(bert: torch.nn.Module) -> None:
    patches = for_base(bert, Tokenizer())
    check_fit(patches, bert, Tokenizer())
    check_fit(patches, bert)  # not given, not compared
    for other in (Tokenizer({"a": 0, "b": 1}), Tokenizer(shift=1)):
        with pytest.raises(
            MismatchError, match=r"tokenizer: expected \w{12}, found \w{12}; give the tokenizer of training"
        ):
            check_fit(patches, bert, other)
        check_fit(patches, bert, other, allow=("tokenizer",))
    grown = Tokenizer()
    before = tokenizer_digest(grown)
    grown.vocabulary["b"] = 1
    assert tokenizer_digest(grown) != before


def test_real_tokenizer_keeps_its_digest_through_use() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "paris": 1, "[PAD]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    first, second = (
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
        for _ in range(2)
    )
    first(["paris", "paris paris"], padding=True, truncation=True, max_length=1)
    assert tokenizer_digest(first) == tokenizer_digest(second)


@pytest.mark.parametrize("change", ["in place", "through data", "replaced", "loaded", "buffer"])
def test_cache_notices_changes(bert: torch.nn.Module, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(bert)
    model.register_buffer("scale", torch.ones(2))
    before = identify(model)
    hashed: list[int] = []
    real = digests._hashed
    monkeypatch.setattr(digests, "_hashed", lambda tensor: hashed.append(1) or real(tensor))
    assert identify(model) == before and not hashed
    weight = model.classifier.weight
    if change == "in place":
        with torch.no_grad():
            weight[1, 3] += 1
    elif change == "through data":
        weight.data += 1
    elif change == "replaced":
        model.classifier.weight = torch.nn.Parameter(weight.detach() + 1)
    elif change == "loaded":
        model.load_state_dict({**model.state_dict(), "classifier.weight": weight.detach() + 1})
    else:
        model.scale += 1
    assert identify(model).all_weights != before.all_weights and len(hashed) <= len(model.state_dict())
    if change == "in place":
        assert len(hashed) == 1


def test_what_is_not_weights_does_not_count(bert: torch.nn.Module) -> None:
    model = copy.deepcopy(bert)
    before = identify(model)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    model.classifier.register_forward_hook(lambda *args: None)
    model.train()
    assert identify(model) == before and identify(torch.compile(model)) == before
    with torch.inference_mode():
        assert identify(copy.deepcopy(bert)) == before


def test_digest_does_not_depend_on_chunks_or_layout(bert: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identify(bert)
    monkeypatch.setattr(digests, "_CHUNK", 7)
    turned = copy.deepcopy(bert)
    weight = turned.classifier.weight
    turned.classifier.weight = torch.nn.Parameter(weight.detach().T.contiguous().T)
    assert not turned.classifier.weight.is_contiguous() and identify(turned) == before


def test_weights_must_be_in_memory(bert: torch.nn.Module) -> None:
    with pytest.raises(MismatchError, match="expected its values in memory, found the meta device"):
        identify(copy.deepcopy(bert).to("meta"))


@pytest.mark.parametrize(
    ("kind", "site", "layer"),
    [
        ("XLMRobertaForSequenceClassification", "roberta.encoder.layer.1", "roberta.encoder.layer.1"),
        ("GPT2ForSequenceClassification", "transformer.h.1.mlp", "transformer.h.1"),
        ("GPT2LMHeadModel", "transformer.h.0.mlp.c_proj", "transformer.h.0"),
        ("BertForMaskedLM", "bert.encoder.layer.0", "bert.encoder.layer.0"),
    ],
)
def test_other_architectures(kind: str, site: str, layer: str) -> None:
    transformers = pytest.importorskip("transformers")
    name = "GPT2" if kind.startswith("GPT2") else "XLMRoberta" if kind.startswith("XLM") else "Bert"
    sizes = (
        {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
        if name == "GPT2"
        else {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    )
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(vocab_size=40, **sizes)).eval()
    identity = identify(model, site=site)
    assert set(identity.touched) == {layer} and (identity.width, identity.layers) == (8, 2)
    assert (identity.id2label is not None) == ("Classification" in kind)
    assert (identity.head is None) == (kind == "GPT2LMHeadModel")  # its only head weight is the shared embedding
    check_fit(for_base(model, site=site), copy.deepcopy(model).bfloat16())


def test_transformers_is_not_imported() -> None:
    code = "import sys, xpatch.patches.identity, xpatch.patches.store; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
