"""`xpatch_onnx.json`: what an exported folder is, which graphs it holds and which patches they take."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xpatch.errors import FormatError
from xpatch.exporters.slots import LANGUAGE, META, Slot
from xpatch.patches.identity import BaseIdentity

FORMAT_VERSION: Literal[1] = 1
CONFIG_FILE = "xpatch_onnx.json"
#: Key of each graph's own copy of `OnnxBase.digest`.
METADATA_KEY = "xpatch_base"
PAST, PRESENT = "past_key_values.", "present."

Kind = Literal["logits", "decoder", "encoder-decoder"]


class Graph(BaseModel):
    """One ONNX file of the folder, with the names of the model's own inputs and outputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class CacheTensor(BaseModel):
    """Keys or values of one attention: `[B, heads, P, width]`, P tokens long. The graph's input is `past_key_values.` + name, its
    output `present.` + name, as Hugging Face's ONNX exports call them. cross: of attention to the encoder, which no step changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    heads: int
    width: int
    cross: bool = False


class OnnxBase(BaseModel):
    """`xpatch_onnx.json`: what an exported base is and which patches it can take.

    kind: "logits", one graph "model" from tokens to logits (classifiers, masked language models); "decoder", one graph "model" with a
    cache of any length, none included; "encoder-decoder", the graphs "encoder" and "decoder", the keys and values of cross
    attention being outputs of the first. inputs: what a tokenizer gives. outputs: what `Session.run` returns. cache: in the graph's order.
    languages: the order of the rows of every mask after the row of ones; None: each adapter brings its own order.
    identity: of the exported model. head_only: the last layer computes the row the head reads alone.
    start_token, end_tokens: of generated text. quantized: "int8" where `quantize_base` made it of a base in fp32, whose identity it keeps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["xpatch-onnx-base"] = "xpatch-onnx-base"
    version: Literal[1] = FORMAT_VERSION
    xpatch: str
    architecture: str
    kind: Kind = "logits"
    graphs: dict[str, Graph] = Field(min_length=1)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[CacheTensor, ...] = ()
    activation: str
    slots: tuple[Slot, ...] = Field(min_length=1)
    languages: tuple[str, ...] | None = None
    identity: BaseIdentity
    labels: tuple[str, ...] = ()
    max_tokens: int | None = None
    pad_token: int = 0
    start_token: int | None = None
    end_tokens: tuple[int, ...] = ()
    opset: int
    head_only: bool = False
    quantized: Literal["int8"] | None = None

    @property
    def optional_inputs(self) -> frozenset[str]:
        """Names of every graph input that belongs to patches."""
        return frozenset().union(*(self.optional_inputs_of(graph) for graph in self.graphs))

    def optional_inputs_of(self, graph: str) -> frozenset[str]:
        """Those of one graph."""
        slots = [slot for slot in self.slots if slot.graph == graph]
        names = {tensor.name for slot in slots for tensor in slot.tensors.values()}
        return frozenset({META, *names, *([LANGUAGE] if any(slot.masked for slot in slots) else [])})

    @property
    def masked(self) -> bool:
        """True where slots take language masks, and so their graph the input `xpatch_language`."""
        return any(slot.masked for slot in self.slots)

    @property
    def digest(self) -> str:
        """sha256 (hex) of this description; each graph holds the same under `xpatch_base` in its metadata."""
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
