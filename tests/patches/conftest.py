"""Small patch sets and tiny models for the tests of `xpatch.patches`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from xpatch.patches import store
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import EditRecord, PatchNeurons, PatchSet

SITE = "bert.encoder.layer.1"


@pytest.fixture
def make_set() -> Callable[..., PatchSet]:
    """`make_set(["a", "b"], unowned=1)`: one neuron per edit and `unowned` more, at the last FFN of a tiny BERT."""

    def make(ids: list[str], *, unowned: int = 0, width: int = 8, name: str | None = None, seed: int = 0) -> PatchSet:
        generator = torch.Generator().manual_seed(seed)
        count = len(ids) + unowned
        keys, values = torch.randn(2, count, width, generator=generator)
        neurons = PatchNeurons(SITE, keys, torch.randn(count, generator=generator), values, "relu")
        edits = tuple(
            EditRecord(
                id=id,
                method="mpn",
                status="edited",
                rows={"neurons.0": (row,)},
                request=EditRequest(
                    id=id, versions={"en": f"Claim {id}", "de": f"Satz {id}"}, target="REFUTES", author="me"
                ),
                created="2026-01-01T00:00:00Z",
                seconds=1.5,
            )
            for row, id in enumerate(ids)
        )
        return PatchSet({"neurons.0": neurons}, edits=edits, name=name)

    return make


@pytest.fixture
def folder(make_set: Callable[..., PatchSet], tmp_path: Path) -> Path:
    """A saved set of two edits, `a` and `b`."""
    return Path(store.save(make_set(["a", "b"]), tmp_path / "x"))


@contextmanager
def soon(seconds: float = 5.0, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Nothing in here may wait; or, by `time.process_time`, compute for long, however busy the machine is."""
    began = clock()
    yield
    assert clock() - began < seconds


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        id2label={0: "REFUTES", 1: "SUPPORTS"},
        label2id={"REFUTES": 0, "SUPPORTS": 1},
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()
