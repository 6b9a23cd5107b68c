"""The named places of an exported graph that patches go to, and the file that describes them.

Axes: `D` width, `N` neurons, `R` rank, `L` languages of a mask, `S` rows of a call (or 1). Every tensor of a slot is a graph
input that is also an initializer, hence optional: with nothing fed the graph computes the base model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xpatch.errors import FormatError
from xpatch.patches.identity import BaseIdentity

FORMAT_VERSION: Literal[1] = 1
CONFIG_FILE = "xpatch_onnx.json"
MODEL_FILE = "model.onnx"
#: Key of the graph's own copy of `OnnxBase.digest`.
METADATA_KEY = "xpatch_base"
#: Unused optional input under which an adapter carries its name, fingerprint and ledger: uint8 `[bytes]`.
META = "xpatch_meta"
#: Which row of the language masks each row of the batch gets: int64 `[S]`, default `[0]`, the row of ones; so
#: does every number a mask has no row for.
LANGUAGE = "xpatch_language"

Dims = tuple[int | str, ...]


class SlotTensor(NamedTuple):
    """One optional graph input: its name, dtype, dimensions (a string is dynamic, minimum 0) and what it is when not fed."""

    name: str
    dims: Dims
    default: np.ndarray[Any, Any]


class Slot(BaseModel):
    """Where patches join the graph, and under which names.

    kind "neurons": keys `[D, N]`, bias `[N]`, values `[N, D]` beside the FFN `site`. kind "lowrank": down `[D_in, R]`, up
    `[R, D_out]` beside the linear layer `site`. Both: select `[S, N or R]` (ones `[1, 1]` by default), which of them each row
    of the batch gets. With `masked`: mask_inner `[L, D_in]`, mask_outer `[L, D_out]` (one row of ones by default).
    The tensors' names are `prefix` + "_" + these keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["neurons", "lowrank"]
    site: str
    prefix: str
    reads: str = Field(description="module whose input is x")
    adds: str = Field(description="module to whose output the patches add")
    width_in: int
    width_out: int
    activation: str | None = None
    masked: bool = True

    @property
    def weights(self) -> tuple[str, str]:
        """Keys of the tensors before and after the activation."""
        return ("keys", "values") if self.kind == "neurons" else ("down", "up")

    def name(self, key: str) -> str:
        """Graph input name of one tensor of this slot."""
        return f"{self.prefix}_{key}"

    @property
    def tensors(self) -> dict[str, SlotTensor]:
        """Every tensor of the slot by key, in the order of the graph inputs."""
        first, last = self.weights
        count = self.name("n" if self.kind == "neurons" else "r")
        found: dict[str, tuple[Dims, np.ndarray[Any, Any]]] = {
            first: ((self.width_in, count), _zeros(self.width_in, 0)),
            last: ((count, self.width_out), _zeros(0, self.width_out)),
            "select": ((self.name("rows"), self.name("selected")), np.ones((1, 1), np.float32)),
        }
        if self.kind == "neurons":
            found["bias"] = ((count,), _zeros(0))
        if self.masked:
            languages = self.name("languages")
            found["mask_inner"] = ((languages, self.width_in), np.ones((1, self.width_in), np.float32))
            found["mask_outer"] = ((languages, self.width_out), np.ones((1, self.width_out), np.float32))
        return {key: SlotTensor(self.name(key), dims, default) for key, (dims, default) in found.items()}


class OnnxBase(BaseModel):
    """`xpatch_onnx.json`: what an exported base is and which patches it can take.

    inputs, outputs: the model's own. languages: the order of the rows of every mask after the row of ones; None: each adapter
    brings its own order. identity: of the exported model. head_only: the last layer computes the row the head reads alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["xpatch-onnx-base"] = "xpatch-onnx-base"
    version: Literal[1] = FORMAT_VERSION
    xpatch: str
    architecture: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    activation: str
    slots: tuple[Slot, ...] = Field(min_length=1)
    languages: tuple[str, ...] | None = None
    identity: BaseIdentity
    labels: tuple[str, ...] = ()
    max_tokens: int | None = None
    pad_token: int = 0
    opset: int
    head_only: bool = False

    @property
    def optional_inputs(self) -> frozenset[str]:
        """Names of every graph input that belongs to patches."""
        names = {tensor.name for slot in self.slots for tensor in slot.tensors.values()}
        return frozenset({META, *names, *([LANGUAGE] if self.masked else [])})

    @property
    def masked(self) -> bool:
        """True where slots take language masks, and so the graph the input `xpatch_language`."""
        return any(slot.masked for slot in self.slots)

    @property
    def digest(self) -> str:
        """sha256 (hex) of this description; the graph holds the same under `xpatch_base` in its metadata."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `xpatch_onnx.json`."""
        return self.model_dump_json(indent=2) + "\n"


def read_base(folder: str | Path) -> OnnxBase:
    """Read `xpatch_onnx.json` of an exported base. Raises `FormatError` for a folder or file that is not one."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FormatError(
            f"{folder} is not an exported base: it holds no {CONFIG_FILE}; write one with `xpatch export base MODEL --out {folder}`"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{path}: expected format version {FORMAT_VERSION}, found {version!r}; export the base with this xpatch"
            )
        return OnnxBase.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{path}: {where}: {first['msg']}; export the base again") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}; export the base again") from None


def prefixes(sites: Iterable[str]) -> list[str]:
    """A lower-case graph name for each site, no two alike: "bert.encoder.layer.3" -> "xpatch_bert_encoder_layer_3"."""
    found: list[str] = []
    for site in sites:
        plain = "xpatch_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in site.lower())
        name, number = plain, 2
        while name in found:
            name, number = f"{plain}_{number}", number + 1
        found.append(name)
    return found


def _zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)
