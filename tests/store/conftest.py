"""Small sets with a ledger, and stores in every kind of place: a local folder, memory://, S3 (moto's server)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xpatch import EditRequest, PatchNeurons, PatchSet, PatchStore
from xpatch.patches.types import EditRecord

COUNTER = itertools.count()
BUCKET = "patches"


def build(seed: int = 0, ids: tuple[str, ...] = ("a",), name: str | None = None, **request: Any) -> PatchSet:
    """One neuron an edit, in English and German; other seeds give other tensors."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, len(ids), 8, generator=draw)
    neurons = PatchNeurons("bert.encoder.layer.1", keys, torch.randn(len(ids), generator=draw), values, "relu")
    edits = tuple(
        EditRecord(
            id=id,
            method="mpn",
            status="edited",
            rows={"neurons.0": (row,)},
            request=EditRequest(id=id, versions={"en": f"Claim {id}", "de": f"Satz {id}"}, target="REFUTES", **request),
        )
        for row, id in enumerate(ids)
    )
    return PatchSet({"neurons.0": neurons}, edits=edits, name=name)


@pytest.fixture
def make_set() -> Callable[..., PatchSet]:
    return build


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, Any]]:
    """Storage options of a bucket on moto's server."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "test", "secret": "test", "endpoint_url": f"http://{host}:{port}"}
    import s3fs

    s3fs.S3FileSystem(**options).mkdir(BUCKET)
    yield options
    server.stop()


@pytest.fixture(params=["local", "memory", "s3"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], PatchStore]:
    """`new_store()`: another `PatchStore` object on one and the same place, as another process would make it."""
    options: dict[str, Any] = {}
    if request.param == "local":
        url: str = str(tmp_path / "store")
    elif request.param == "memory":
        pytest.importorskip("fsspec")
        url = f"memory://store-{next(COUNTER)}"
    else:
        options = request.getfixturevalue("s3_options")
        url = f"s3://{BUCKET}/store-{next(COUNTER)}"
    return lambda: PatchStore(url, **options)


@pytest.fixture
def store(new_store: Callable[[], PatchStore]) -> PatchStore:
    return new_store()


@pytest.fixture
def local(tmp_path: Path) -> PatchStore:
    return PatchStore(tmp_path / "store")
