"""Tiny random classifiers, each exported once for all tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import xpatch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

from xpatch.exporters import export_base  # noqa: E402
from xpatch.patches.identity import identify  # noqa: E402

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # else the logits of a random model hardly depend on its input
}


def bert(seed: int = 0):
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()


def xlm_roberta():
    torch.manual_seed(1)
    config = transformers.XLMRobertaConfig(**SIZES, type_vocab_size=1, num_labels=3)
    return transformers.XLMRobertaForSequenceClassification(config).eval()


def exported(model, folder, site, **options):
    """A model, its exported base, and what the tests need to make patches for it."""
    export_base(model, folder, **options)
    return SimpleNamespace(model=model, folder=folder, site=site, down=f"{site}.output.dense", base=identify(model))


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory):
    """BERT with a ReLU slot at its final FFN and a low-rank slot at its down projection."""
    return exported(bert(), tmp_path_factory.mktemp("onnx") / "bert", "bert.encoder.layer.1")


@pytest.fixture(scope="session")
def xlmr_base(tmp_path_factory):
    """XLM-R with GELU slots at both FFNs, a low-rank slot at an up projection, and languages in a fixed order."""
    return exported(
        xlm_roberta(),
        tmp_path_factory.mktemp("onnx") / "xlmr",
        "roberta.encoder.layer.1",
        activation="gelu",
        sites=["roberta.encoder.layer.0", "roberta.encoder.layer.1"],
        linears=["roberta.encoder.layer.1.intermediate.dense"],
        languages=["en", "zh", "ar"],
    )


def batch(rows: int = 4, tokens: int = 9, padding: int = 0):
    """Token ids and mask, `[rows, tokens]`, the last row padded at its end."""
    ids = torch.randint(5, 60, (rows, tokens))
    mask = torch.ones_like(ids)
    ids[-1, 6:], mask[-1, 6:] = padding, 0
    return {"input_ids": ids, "attention_mask": mask}


def neurons(site, count, activation="relu", mask=None, width=32, scale=1.0):
    return xpatch.PatchNeurons(
        site=site,
        keys=torch.randn(count, width) * 0.3,
        bias=torch.randn(count) * 0.3,
        values=torch.randn(count, width) * scale,
        activation=activation,
        mask=mask,
    )


def lowrank(site, rank, inside=64, outside=32, mask=None):
    return xpatch.LowRankDelta(site=site, down=torch.randn(rank, inside), up=torch.randn(outside, rank), mask=mask)


def masks(*languages, inside=32, outside=32):
    kept = (torch.rand(len(languages), inside) > 0.3).float(), (torch.rand(len(languages), outside) > 0.3).float()
    return xpatch.LanguageMask(languages=languages, inner=kept[0], outer=kept[1])


def torch_logits(model, inputs, *sets, rows=None):
    """What `model` answers with the sets applied (and taken off again): `[B, C]`."""
    for number, patches in enumerate(sets):
        xpatch.apply(model, patches, name=patches.name or f"set{number}")
    try:
        with torch.no_grad():
            extra = {"xpatch": rows} if rows is not None else {}
            return model(**inputs, **extra).logits.numpy()
    finally:
        if sets:
            xpatch.remove(model)


def close(one, other, tolerance=1e-4):
    return one.shape == other.shape and float(np.abs(one - other).max()) < tolerance
