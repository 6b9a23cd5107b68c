"""Patches beside quantised linears, and which quantised model a set fits. Everything here runs on the CPU."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import xpatch
from xpatch import DenseDelta, LowRankDelta, PatchNeurons, PatchSet
from xpatch.errors import MismatchError
from xpatch.models.anatomy import final_ffn, find_ffn_sites
from xpatch.patches.identity import BaseIdentity, check_fit, identify

WIDE = {"hidden_size": 64, "intermediate_size": 128}  #: bitsandbytes packs blocks of 64
METHODS = ("torch-int8", "torchao-int8", "torchao-int4", "bitsandbytes-int8", "bitsandbytes-nf4")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantiz.*"),
    pytest.mark.filterwarnings("ignore:.*cast from torch.float32"),
]


def quantised(model: nn.Module, method: str) -> nn.Module:
    """`model` with the linears of its blocks quantised, in place. Skips where the library is missing or cannot do it here."""
    library, _, kind = method.partition("-")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "torch":
        if "fbgemm" not in torch.backends.quantized.supported_engines and torch.backends.quantized.engine == "none":
            pytest.skip("this build of torch has no quantised kernels")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    elif library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        whole = getattr(quantization, "IntxWeightOnlyConfig", None)
        if kind == "int4" and whole is None:
            pytest.skip("this torchao has no int4 weights that run on a CPU")
        settings = quantization.Int8WeightOnlyConfig() if kind == "int8" else whole(weight_dtype=torch.int4)
        quantization.quantize_(model, settings)
    else:
        _bitsandbytes(model.base_model, kind)
        model.to("cpu")
    return model


def _bitsandbytes(module: nn.Module, kind: str) -> None:
    import bitsandbytes as bnb

    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            _bitsandbytes(child, kind)
            continue
        sizes, weight = (child.in_features, child.out_features), child.weight.detach().clone()
        if kind == "int8":
            new: Any = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        new.bias = child.bias
        setattr(module, name, new)


def set_for(model: nn.Module, form: str, base: BaseIdentity | None = None) -> PatchSet:
    site = final_ffn(model)
    if form == "neurons":
        part: Any = PatchNeurons(site.name, torch.randn(5, 64), torch.randn(5), torch.randn(5, 64), "relu")
    elif form == "lowrank":
        part = LowRankDelta(site.down, torch.randn(3, 128), torch.randn(64, 3))
    else:
        part = DenseDelta(site.up, torch.randn(128, 64), torch.randn(128))
    return PatchSet(parts={"part": part}, base=base)


@pytest.mark.parametrize("form", ["neurons", "lowrank", "dense"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert-mlm", "llama"])
@torch.no_grad()
def test_beside_quantised_linears(tiny, token_ids, side_path_on, check, family, method, form):
    plain = tiny(family, **WIDE)
    model, twin = quantised(copy.deepcopy(plain), method), quantised(copy.deepcopy(plain), method)
    inputs = {"input_ids": token_ids}
    assert not torch.equal(model(**inputs)[0], plain(**inputs)[0])
    assert find_ffn_sites(model) == find_ffn_sites(plain)
    patches = set_for(model, form)
    check(model, patches, side_path_on(twin, patches), inputs)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_set_fits_the_quantised_copies_of_its_base(tiny, token_ids, method):
    """Nothing to allow, before and after the library repacks its weights; and the other way round."""
    plain = tiny("bert-mlm", **WIDE)
    patches = set_for(plain, "neurons", identify(plain, site=final_ffn(plain).name))
    model = quantised(copy.deepcopy(plain), method)
    identity = identify(model, site=final_ffn(plain).name)
    assert identity.quantisation == method.partition("-")[0]
    assert BaseIdentity.model_validate_json(identity.model_dump_json()) == identity
    check_fit(patches, model)
    base = model(token_ids).logits
    assert not torch.equal(xpatch.apply(model, patches)(token_ids).logits, base)
    assert torch.equal(xpatch.remove(model)(token_ids).logits, base)
    assert identify(model, site=final_ffn(plain).name) == identity
    check_fit(set_for(plain, "neurons", identity), plain)
    check_fit(set_for(plain, "neurons", identity), quantised(copy.deepcopy(plain), "torchao-int8"))
    check_fit(set_for(plain, "neurons", identify(copy.deepcopy(plain).bfloat16())), model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changed",
    ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.LayerNorm.weight", "cls.predictions.bias"],
)
@torch.no_grad()
def test_the_quantised_copy_of_another_model_does_not_fit(tiny, method, changed):
    plain = tiny("bert-mlm", **WIDE)
    patches = set_for(plain, "neurons", identify(plain, site=final_ffn(plain).name))
    other = copy.deepcopy(plain)
    other.get_parameter(changed).view(-1)[3] += 1
    model = quantised(other, method)
    library = method.partition("-")[0]
    with pytest.raises(
        MismatchError,
        match=rf"embeddings, norms and biases, .* \(the model is quantised \({library}\)\), in fp32: expected \w{{12}}, found \w{{12}}; .*"
        r"allow=\('all_weights',\)",
    ):
        check_fit(patches, model)
    check_fit(patches, model, allow=("all_weights",))
    with pytest.raises(MismatchError):
        check_fit(patches, model, allow=("layer", "head"))


@torch.no_grad()
def test_the_rest_of_the_description_still_counts(tiny):
    plain = tiny("bert", num_labels=3, **WIDE)
    base = identify(plain)
    model = quantised(copy.deepcopy(plain), "torchao-int8")
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(MismatchError, match="labels: expected"):
        check_fit(set_for(plain, "neurons", base), model)
    check_fit(set_for(plain, "neurons", base), model, allow=("labels",))


@torch.no_grad()
def test_sets_that_recorded_too_little_say_so(tiny):
    plain = tiny("bert-mlm", **WIDE)
    old = identify(plain).model_copy(update={"unquantised": None})
    model = quantised(copy.deepcopy(plain), "torchao-int8")
    with pytest.raises(MismatchError, match="an older version of xpatch did not record"):
        check_fit(set_for(plain, "neurons", old), model)
    check_fit(set_for(plain, "neurons", old), plain)
    check_fit(set_for(plain, "neurons", old), model, allow=("all_weights",))


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
@torch.no_grad()
def test_loaded_quantised_by_transformers(tiny, token_ids, tmp_path, method):
    """from_pretrained with a quantisation_config: the origin is recorded, saving and loading the quantised model keeps the fit."""
    hf = pytest.importorskip("transformers")
    pytest.importorskip(method)
    plain = tiny("llama", **WIDE)
    plain.save_pretrained(tmp_path / "plain")
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings: Any = hf.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        settings = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = hf.AutoModelForCausalLM.from_pretrained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(tmp_path / "plain", quantization_config=settings).eval()
        patches = set_for(plain, "neurons", identify(plain, site=final_ffn(plain).name))
        base = model(token_ids).logits
        assert not torch.equal(xpatch.apply(model, patches)(token_ids).logits, base)
        assert torch.equal(xpatch.remove(model)(token_ids).logits, base)
        identity = identify(model)
        assert (identity.quantisation, identity.origin) == (method, str(tmp_path / "plain"))
        model.save_pretrained(tmp_path / "quantised")
        again = load(tmp_path / "quantised").eval()
    check_fit(patches, again)
    check_fit(set_for(plain, "neurons", identity), again)  # loaded from elsewhere, the same model
