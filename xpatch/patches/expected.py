"""Which tensors a config promises, checked against the forms and the limits before the tensor file is read at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xpatch.errors import FormatError
from xpatch.patches import checks
from xpatch.patches.config import PatchConfig
from xpatch.patches.forms import DenseDelta, Gate, LanguageMask, LowRankDelta, PatchNeurons
from xpatch.patches.jsonl import shorten
from xpatch.patches.limits import Limits
from xpatch.patches.tensorfile import BYTES_PER_NUMBER

_FORMS: dict[str, Any] = {form.form: form for form in (PatchNeurons, LowRankDelta, DenseDelta)}
# Form -> tensor -> its axes; "N" stands for rows that count against the limit `neurons`, "L" for languages, "D" for a width.
_AXES: dict[Any, dict[str, str]] = {
    PatchNeurons: {"keys": "ND", "bias": "N", "values": "ND"},
    LowRankDelta: {"down": "ND", "up": "DN"},
    DenseDelta: {"weight": "DD", "bias": "D"},
    LanguageMask: {"inner": "LD", "outer": "LD"},
    Gate: {"keys": "ND", "radii": "N"},
}
_LIMIT_OF = {"N": "neurons", "L": "languages", "D": "width"}


def form_of(word: str) -> Any:
    """ "neurons" -> PatchNeurons, and so on."""
    return _FORMS[word]


def expected_tensors(config: PatchConfig, *, where: str, limits: Limits) -> dict[str, list[int]]:
    """Tensor name -> shape, as the tensor file must hold them.

    Raises `FormatError` for a name that no tensor can bear, a tensor its form does not have, a missing one, a shape with another
    number of axes, and above a limit.
    """
    expected: dict[str, list[int]] = {}
    rows = 0
    kinds: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
        ("part", "", config.parts),
        ("mask", "masks.", config.masks),
        ("gate", "gates.", config.gates),
    )
    for word, prefix, values in kinds:
        for name, value in values.items():
            told = f"{where}: {word} {name!r}"
            checks.name(name, f"{told}, name", plain=True)
            kind = form_of(value.form) if word == "part" else LanguageMask if word == "mask" else Gate
            axes = _AXES[kind]
            _check_fields(kind, set(value.tensors), told)
            for key, shape in value.tensors.items():
                if len(shape) != len(axes[key]):
                    raise FormatError(
                        f"{told}, {key}: expected a shape of {len(axes[key])} axes, found {shorten(str(shape))}; restore the file"
                    )
                for axis, size in zip(axes[key], shape, strict=True):
                    limits.check(_LIMIT_OF[axis], size, f"{told}, {key}")
                expected[f"{prefix}{name}.{key}"] = list(shape)
            rows += max(
                (shape[axes[key].index("N")] for key, shape in value.tensors.items() if "N" in axes[key]), default=0
            )
    limits.check("neurons", rows, where)
    limits.check("tensors", len(expected), where)
    limits.check("tensor_bytes", total_bytes(expected), where)
    return expected


def total_bytes(expected: dict[str, list[int]]) -> int:
    """Bytes of all these tensors together."""
    total = 0
    for shape in expected.values():
        numbers = BYTES_PER_NUMBER
        for size in shape:
            numbers *= size
        total += numbers
    return total


def _check_fields(kind: Any, given: set[str], told: str) -> None:
    known = set(kind.tensor_fields)
    optional = {"bias"} if kind is DenseDelta else known if kind is Gate else set()  # a threshold gate has no tensors
    if not given <= known or not known - given <= optional:
        found = shorten(", ".join(sorted(given))) or "none"
        raise FormatError(f"{told}, tensors: expected {', '.join(kind.tensor_fields)}, found {found}; restore the file")
