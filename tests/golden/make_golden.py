"""Writes the golden patch folder of a format version: `python tests/golden/make_golden.py FOLDER`.

Run once per format version; a committed folder is never written again, for it proves that old patches still load.
"""

from __future__ import annotations

import sys

import torch

from xpatch.patches import store
from xpatch.patches.digests import Digests
from xpatch.patches.identity import BaseIdentity
from xpatch.patches.requests import EditRequest, Probe, Version
from xpatch.patches.types import (
    DenseDelta,
    EditRecord,
    Gate,
    LanguageMask,
    LowRankDelta,
    PatchNeurons,
    PatchSet,
)


def ramp(*shape: int, start: float = -1.0) -> torch.Tensor:
    """start, start + 1/8, start + 2/8 … : exact in fp32 on every machine."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) / 8 + start


def patch_set() -> PatchSet:
    """One set with every form of the format, a full request, and a redacted one."""
    request = EditRequest(
        id="capital",
        versions={
            "en": Version(
                text="Paris is the capital of Italy.",
                subject="Italy",
                rephrases=(Probe(text="Italy's capital is Paris."),),
                locality=(Probe(text="Oslo is the capital of Norway.", target="SUPPORTS"),),
            ),
            "zh": Version(text="巴黎是意大利的首都。"),
            "ar": Version(text="باريس هي عاصمة إيطاليا.", text_pair="روما", target="REFUTES"),
        },
        target="REFUTES",
        old_target="SUPPORTS",
        author="A. Nonymous",
        reason="wrong",
        expires="2030-01-01",
    )
    weights = Digests(fp32="0" * 64, fp16="1" * 64, bf16="2" * 64)
    layer = "bert.encoder.layer.3"
    return PatchSet(
        parts={
            "neurons.0": PatchNeurons(layer, ramp(3, 4), ramp(3), ramp(3, 4, start=0.5), "relu", mask="languages"),
            "neurons.1": PatchNeurons(layer, ramp(0, 4), ramp(0), ramp(0, 4), "gelu"),
            "lowrank.0": LowRankDelta(f"{layer}.output.dense", ramp(2, 6), ramp(4, 2), gate="near"),
            "dense.0": DenseDelta(f"{layer}.intermediate.dense", ramp(6, 4), ramp(6), gate="large"),
            "dense.1": DenseDelta(f"{layer}.output.dense", ramp(4, 6)),
        },
        edits=(
            EditRecord(
                id="capital",
                method="mpn",
                status="edited",
                request=request,
                rows={"neurons.0": (0, 2)},
                hyperparameters={
                    "steps": 600,
                    "learning_rate": 1e-2,
                    "languages": ["en", "zh"],
                    "memory": {"rows": 6000},
                },
                seed=7,
                created="2026-01-02T03:04:05Z",
                seconds=0.25,
            ),
            EditRecord(id="right", method="mpn", status="already-right", message="the base model says so already"),
            EditRecord(
                id="batch/1", method="memit", status="edited", rows={"lowrank.0": (0, 1), "dense.0": ()}, group="batch"
            ),
            EditRecord(id="batch/2", method="memit", status="lost", rows={"dense.0": (), "dense.1": ()}, group="batch"),
        ),
        masks={"languages": LanguageMask(("en", "zh"), ramp(2, 4, start=0.0), ramp(2, 4, start=1.0))},
        gates={
            "near": Gate("ball", keys=ramp(1, 6), radii=ramp(1, start=2.0)),
            "large": Gate("threshold", threshold=0.1),
        },
        base=BaseIdentity(
            architecture="BertForSequenceClassification",
            width=4,
            layers=4,
            activation="gelu",
            id2label={0: "REFUTES", 1: "SUPPORTS"},
            all_weights=weights,
            body=weights,
            head=weights,
            touched={layer: weights},
            dtype="float32",
            tokenizer="3" * 64,
        ),
        name="golden",
    )


if __name__ == "__main__":
    print(store.save(patch_set(), sys.argv[1]))
