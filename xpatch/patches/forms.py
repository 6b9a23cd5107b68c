"""The five patch forms of the format, as values: neurons, low-rank and dense deltas, language masks and gates.

Axes: `D` model width, `N` patch neurons, `R` rank, `L` languages, `K` gate keys. Every value checks itself when it is made
(`FormatError`: what, where, expected, found, next step) and keeps private copies of its tensors: contiguous, on the CPU, in
fp32, detached. Fields cannot be assigned and mappings are read-only; torch has no read-only tensors, so the tensors must not
be written to. Copying a value, deeply or not, gives the value itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch

from xpatch.errors import FormatError
from xpatch.patches import checks

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "identity")


class Value:
    """An immutable value: a copy is the value itself, and it can be sent to another process."""

    tensor_fields: ClassVar[tuple[str, ...]] = ()

    def _set(self, **values: Any) -> None:
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        plain = {key: checks.thawed(value) if isinstance(value, MappingProxyType) else value for key, value in values}
        return _rebuild, (type(self), plain)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The value's tensors by field name; fields that are None are left out."""
        return {key: getattr(self, key) for key in self.tensor_fields if getattr(self, key) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in fp32."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class PatchNeurons(Value):
    """`y += act(x Kᵀ + b) V` beside the FFN named `site` (Transformer-Patcher eq. 4-6; MPN eq. 7-8).

    keys `[N, D]`, bias `[N]`, values `[N, D]`. `mask` and `gate` name a `LanguageMask` / `Gate` of the same set.
    """

    form: ClassVar[str] = "neurons"
    tensor_fields: ClassVar[tuple[str, ...]] = ("keys", "bias", "values")
    site: str
    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    activation: str
    mask: str | None = None
    gate: str | None = None

    def __post_init__(self) -> None:
        where = _where_part(self)
        checks.one_of(self.activation, ACTIVATIONS, f"{where}, activation")
        sizes: dict[str, int] = {}
        axes = {"keys": ("N", "D"), "bias": ("N",), "values": ("N", "D")}
        self._set(
            **{key: checks.frozen_tensor(getattr(self, key), f"{where}, {key}", axes[key], sizes) for key in axes}
        )

    @property
    def count(self) -> int:
        """N, the rows edits can own."""
        return self.keys.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """(width of x, width of y), both D."""
        return self.keys.shape[1], self.values.shape[1]


@dataclass(frozen=True, eq=False)
class LowRankDelta(Value):
    """`y += (x downᵀ) upᵀ` beside the linear layer named `site`. down `[R, D_in]`, up `[D_out, R]`."""

    form: ClassVar[str] = "lowrank"
    tensor_fields: ClassVar[tuple[str, ...]] = ("down", "up")
    site: str
    down: torch.Tensor
    up: torch.Tensor
    mask: str | None = None
    gate: str | None = None

    def __post_init__(self) -> None:
        where = _where_part(self)
        sizes: dict[str, int] = {}
        axes = {"down": ("R", "D_in"), "up": ("D_out", "R")}
        self._set(
            **{key: checks.frozen_tensor(getattr(self, key), f"{where}, {key}", axes[key], sizes) for key in axes}
        )

    @property
    def count(self) -> int:
        """R, the rows edits can own: row r of `down` with column r of `up`."""
        return self.down.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """(D_in, D_out)."""
        return self.down.shape[1], self.up.shape[0]


@dataclass(frozen=True, eq=False)
class DenseDelta(Value):
    """`y += x ΔWᵀ + Δb` beside the linear layer named `site`. weight `[D_out, D_in]`, bias `[D_out]` or None."""

    form: ClassVar[str] = "dense"
    tensor_fields: ClassVar[tuple[str, ...]] = ("weight", "bias")
    count: ClassVar[int] = 0  # no rows: edits share it as a whole
    site: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    mask: str | None = None
    gate: str | None = None

    def __post_init__(self) -> None:
        where = _where_part(self)
        sizes: dict[str, int] = {}
        self._set(weight=checks.frozen_tensor(self.weight, f"{where}, weight", ("D_out", "D_in"), sizes))
        if self.bias is not None:
            self._set(bias=checks.frozen_tensor(self.bias, f"{where}, bias", ("D_out",), sizes))

    @property
    def widths(self) -> tuple[int, int]:
        """(D_in, D_out)."""
        return self.weight.shape[1], self.weight.shape[0]


@dataclass(frozen=True, eq=False)
class LanguageMask(Value):
    """`x ⊙ inner[lang(row)]` before the keys, `⊙ outer[lang(row)]` after the values (LiME).

    inner `[L, D_in]`, outer `[L, D_out]`, one row per language of `languages`.
    """

    tensor_fields: ClassVar[tuple[str, ...]] = ("inner", "outer")
    languages: tuple[str, ...]
    inner: torch.Tensor
    outer: torch.Tensor

    def __post_init__(self) -> None:
        if isinstance(self.languages, str) or not self.languages:
            raise FormatError(
                f"language mask, languages: expected one language code or more, found {self.languages!r}; list them"
            )
        languages = tuple(checks.name(code, "language mask, languages") for code in self.languages)
        if len(set(languages)) < len(languages):
            raise FormatError(
                f"language mask, languages: expected each language once, found {list(languages)}; remove the repeated one"
            )
        sizes = {"L": len(languages)}
        inner = checks.frozen_tensor(self.inner, "language mask, inner", ("L", "D_in"), sizes)
        self._set(
            languages=languages,
            inner=inner,
            outer=checks.frozen_tensor(self.outer, "language mask, outer", ("L", "D_out"), sizes),
        )


@dataclass(frozen=True, eq=False)
class Gate(Value):
    """Which rows the parts that name it act on.

    kind "ball": open where the nearest key j has `‖x - keys[j]‖₂ <= radii[j]` (GRACE); keys `[K, D]`, radii `[K]`.
    kind "threshold": open where the part's own output has `‖Δy‖₂ >= threshold` (WISE); keys and radii are None.
    """

    tensor_fields: ClassVar[tuple[str, ...]] = ("keys", "radii")
    kind: Literal["ball", "threshold"]
    keys: torch.Tensor | None = None
    radii: torch.Tensor | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        checks.one_of(self.kind, ("ball", "threshold"), "gate, kind")
        ball = self.kind == "ball"
        needed = "keys and radii, no threshold" if ball else "a threshold, no keys or radii"
        given = [key for key in ("keys", "radii", "threshold") if getattr(self, key) is not None]
        if given != (["keys", "radii"] if ball else ["threshold"]):
            raise FormatError(
                f"gate of kind {self.kind!r}: expected {needed}, found {', '.join(given) or 'none'}; give what the kind needs"
            )
        if ball:
            sizes: dict[str, int] = {}
            self._set(keys=checks.frozen_tensor(self.keys, "gate, keys", ("K", "D"), sizes))
            self._set(radii=checks.frozen_tensor(self.radii, "gate, radii", ("K",), sizes))
        else:
            self._set(threshold=checks.optional_number(self.threshold, "gate, threshold"))


Part = PatchNeurons | LowRankDelta | DenseDelta


def _where_part(part: Part) -> str:
    where = f"{part.form} part at {checks.name(part.site, f'{part.form} part, site')!r}"
    for reference in ("mask", "gate"):
        checks.optional_name(getattr(part, reference), f"{where}, {reference}")
    return where


def _rebuild(kind: type, values: dict[str, Any]) -> Any:
    return kind(**values)
