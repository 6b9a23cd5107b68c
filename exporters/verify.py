"""`verify`: does an exported base, with and without patches, answer as the PyTorch model does, in every language?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xpatch.errors import FormatError, MismatchError
from xpatch.exporters.adapter import read_adapter
from xpatch.exporters.feed import Array
from xpatch.exporters.session import Session
from xpatch.exporters.side import side_paths
from xpatch.exporters.trace import evaluating
from xpatch.patches import identity
from xpatch.patches.requests import EditRequest
from xpatch.patches.store import load
from xpatch.patches.types import LowRankDelta, Part, PatchNeurons, PatchSet
from xpatch.runtime.routing import Rows

TOLERANCE = 1e-4
Text = str | tuple[str, str]
_SAID = 8  # tokens that an encoder-decoder generates for the comparison


@dataclass(frozen=True)
class LanguageParity:
    """PyTorch against ONNX Runtime on one language's texts. differences: largest over all logits. changed: predictions (argmax, of
    language models at every token) that differ. moved: predictions that the patches change, in PyTorch; 0 means that the patched
    comparison shows little."""

    language: str
    texts: int = 0
    base_max_diff: float = 0.0
    patched_max_diff: float = 0.0
    base_changed: int = 0
    patched_changed: int = 0
    moved: int = 0

    def joined(self, other: LanguageParity) -> LanguageParity:
        """Both together, of one language."""
        return LanguageParity(
            self.language,
            self.texts + other.texts,
            _larger(self.base_max_diff, other.base_max_diff),
            _larger(self.patched_max_diff, other.patched_max_diff),
            self.base_changed + other.base_changed,
            self.patched_changed + other.patched_changed,
            self.moved + other.moved,
        )


@dataclass(frozen=True)
class Parity:
    """The result of `verify`: one `LanguageParity` per language."""

    languages: tuple[LanguageParity, ...]
    tolerance: float = TOLERANCE

    @property
    def max_diff(self) -> float:
        """The largest difference of any logit, patched or not."""
        return max(max(one.base_max_diff, one.patched_max_diff) for one in self.languages)

    @property
    def changed(self) -> int:
        """How many predictions differ between PyTorch and ONNX Runtime, patched or not."""
        return sum(one.base_changed + one.patched_changed for one in self.languages)

    @property
    def ok(self) -> bool:
        """True when every difference is below the tolerance and no prediction differs."""
        return self.max_diff < self.tolerance and self.changed == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "ok": self.ok,
            "max_diff": self.max_diff,
            "changed": self.changed,
            "tolerance": self.tolerance,
            "languages": {
                one.language: {k: v for k, v in asdict(one).items() if k != "language"} for one in self.languages
            },
        }


def verify(
    model: nn.Module,
    tokenizer: Any,
    base_folder: str | Path,
    patches: PatchSet | str | Path,
    texts: Mapping[str, Sequence[Text]],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    tolerance: float = TOLERANCE,
    providers: Sequence[str] | None = None,
    allow: Iterable[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Parity:
    """Compare PyTorch and ONNX Runtime on texts (or pairs of texts) of each language, with the patches and without.

    model: the unpatched model that was exported, in fp32; left as it was. The PyTorch side computes the patches with the reference
    maths of `xpatch.ops.reference`, independently of the graph. Language models are compared at every token of the texts,
    encoder-decoders at the tokens that the patched model says of them. patches: a set, a patch folder or an `.onnx_adapter`.
    allow: identity checks to leave out, as in `xpatch.apply`. progress: called with the language, its texts done and all of them.
    A difference is reported, not raised; of a base in int8 (`quantize_base`) one is to be expected.
    Raises `MismatchError` or `FormatError` where the three do not belong together or no texts are given.
    """
    if not isinstance(patches, PatchSet):
        source = Path(patches)
        patches = load(source) if source.is_dir() else read_adapter(source)
    found = verify_sets(
        model, tokenizer, base_folder, {"patches": patches}, texts, batch_size=batch_size, max_length=max_length, tolerance=tolerance,
        providers=providers, allow=allow, progress=progress,
    )  # fmt: skip
    return found["patches"]


def verify_sets(
    model: nn.Module,
    tokenizer: Any,
    base_folder: str | Path,
    sets: Mapping[str, PatchSet],
    texts: Mapping[str, Sequence[Text]],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    tolerance: float = TOLERANCE,
    providers: Sequence[str] | None = None,
    allow: Iterable[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Parity]:
    """`verify` for several sets by name, one at a time; the unpatched model is asked once for all of them, where they share their inputs."""
    if not texts or not all(texts.values()):
        raise MismatchError("verify expects a mapping from each language to its texts; found no texts")
    allow = (allow,) if isinstance(allow, str) else tuple(allow)
    session = Session(base_folder, sets, providers=providers, threads=torch.get_num_threads(), allow=allow)
    difference = identity.first_difference(session.base.identity, identity.identify(model, tokenizer), allow=allow)
    if difference is not None:
        raise MismatchError(f"the base in {base_folder} was not exported from this model: {difference}")
    device = next(model.parameters()).device
    limit = min(length for length in (max_length, session.base.max_tokens, 512) if length is not None)
    speaks = session.base.kind == "encoder-decoder"
    found: dict[str, list[LanguageParity]] = {name: [] for name in sets}
    for language, texts_there in texts.items():
        own = sorted(texts_there, key=_length)  # little padding
        parity = {name: LanguageParity(language) for name in sets}
        for start in range(0, len(own), batch_size):
            encoded = _encode(tokenizer, own[start : start + batch_size], limit, session.base.inputs)
            inputs = {name: value.to(device) for name, value in encoded.items()}
            base: dict[str, Array] = {}
            for name, patches in sets.items():
                with side_paths(model, patches, language):
                    if speaks:
                        inputs["decoder_input_ids"] = _said(model, {key: inputs[key] for key in encoded})
                    logits = {"torch patched": _logits(model, inputs)}
                arrays = {key: value.cpu().numpy() for key, value in inputs.items()}
                if speaks or not base:
                    base = {
                        "torch": _logits(model, inputs),
                        "ort": session.run(arrays, xpatch=Rows(patches="__base__"))["logits"],
                    }
                logits |= {
                    **base,
                    "ort patched": session.run(arrays, xpatch=Rows(patches=name, languages=language))["logits"],
                }
                if not speaks and logits["ort"].ndim == 3:  # of padding nothing is asked
                    real = arrays["attention_mask"].astype(bool)
                    logits = {key: value[real] for key, value in logits.items()}
                parity[name] = parity[name].joined(_compare(language, logits, len(inputs["input_ids"])))
            if progress is not None:
                progress(language, min(start + batch_size, len(own)), len(own))
        for name, one in parity.items():
            found[name].append(one)
    return {name: Parity(tuple(languages), tolerance) for name, languages in found.items()}


def _larger(one: float, other: float) -> float:
    return float(np.maximum(one, other))  # NaN stays NaN


def texts_of(requests: Iterable[EditRequest]) -> dict[str, list[Text]]:
    """language -> the distinct texts (or pairs) of edit requests, rephrases and locality probes included."""
    found: dict[str, dict[Text, None]] = {}
    for request in requests:
        for language, version in request.versions.items():
            for probe in (version.probe, *version.rephrases, *version.locality):
                text: Text = probe.text if probe.text_pair is None else (probe.text, probe.text_pair)
                found.setdefault(language, {})[text] = None
    return {language: list(texts) for language, texts in found.items()}


def first_rows(patches: PatchSet) -> PatchSet:
    """The set cut to the first neuron (or rank) of each part, without a ledger: the smallest thing a slot can hold."""
    parts: dict[str, Part] = {}
    for name, part in patches.parts.items():
        if isinstance(part, PatchNeurons):
            part = replace(part, keys=part.keys[:1], bias=part.bias[:1], values=part.values[:1])
        elif isinstance(part, LowRankDelta):
            part = replace(part, down=part.down[:1], up=part.up[:, :1])
        parts[name] = part
    return PatchSet(parts=parts, masks=patches.masks, gates=patches.gates, base=patches.base)


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _encode(tokenizer: Any, texts: Sequence[Text], limit: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    pairs = [text for text in texts if not isinstance(text, str)]
    if pairs and len(pairs) < len(texts):
        raise FormatError("the texts of one language must be all single texts or all pairs")
    columns = [list(column) for column in zip(*pairs, strict=True)] if pairs else [list(texts)]
    encoded = tokenizer(*columns, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    return {name: encoded[name] for name in names if name in encoded}


def _logits(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Array:
    with evaluating(model), torch.no_grad():
        logits: Array = model(**inputs)["logits"].float().cpu().numpy()
    return logits


def _said(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What an encoder-decoder says of the texts, as its decoder's inputs."""
    with evaluating(model), torch.no_grad():
        said: torch.Tensor = model.generate(**inputs, max_new_tokens=_SAID, do_sample=False, num_beams=1)
    return said


def _compare(language: str, logits: Mapping[str, Array], texts: int) -> LanguageParity:
    best = {name: values.argmax(-1) for name, values in logits.items()}
    return LanguageParity(
        language=language,
        texts=texts,
        base_max_diff=float(np.abs(logits["torch"] - logits["ort"]).max(initial=0.0)),
        patched_max_diff=float(np.abs(logits["torch patched"] - logits["ort patched"]).max(initial=0.0)),
        base_changed=int((best["torch"] != best["ort"]).sum()),
        patched_changed=int((best["torch patched"] != best["ort patched"]).sum()),
        moved=int((best["torch"] != best["torch patched"]).sum()),
    )
