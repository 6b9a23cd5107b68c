"""How large a patch folder may be before it is refused: a folder is untrusted input, and reading it must stay bounded.

The defaults leave room for real sets: 13 000 edits with wordings in 17 languages, dense deltas of a layer of width 8192. What
lies above them is read only when asked for: `xpatch.load(folder, limits=xpatch.Limits(neurons=5_000_000))`. Saving knows no limits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from xpatch.errors import FormatError

_MIB = 1 << 20
DEEPEST = 200
"""No limit may allow deeper nesting: Python's own recursion ends not far above it."""

_MEANING = {
    "config_bytes": "bytes",
    "config_values": "JSON values",
    "config_depth": "levels of nesting",
    "tensor_bytes": "bytes of tensors",
    "header_bytes": "bytes of tensor names and shapes",
    "signature_bytes": "bytes",
    "parts": "parts (or masks, or gates)",
    "tensors": "tensors",
    "edits": "edits",
    "languages": "languages",
    "neurons": "rows (neurons, ranks and gate keys)",
    "width": "as a tensor's width",
}


@dataclass(frozen=True)
class Limits:
    """The most that a patch folder may hold. Each limit is a whole number, inclusive.

    config_bytes: size of `patch_config.json`; config_values: JSON values in one file; config_depth: how deep they may nest (at
    most 200). tensor_bytes: all tensors together; header_bytes: the header of `patch_model.safetensors`. signature_bytes: size of
    `patch_signature.json`. parts: parts, masks and gates, each; tensors, edits: of the set; languages: of one mask or one request;
    neurons: patch neurons, ranks and gate keys of all parts together; width: any other axis of a tensor.

    Reading takes at most about 1 KiB of memory for each JSON value and three times the tensors' bytes, whatever the files hold.
    """

    config_bytes: int = 64 * _MIB
    config_values: int = 2_000_000
    config_depth: int = 64
    tensor_bytes: int = 2048 * _MIB
    header_bytes: int = 8 * _MIB
    signature_bytes: int = _MIB // 4
    parts: int = 10_000
    tensors: int = 50_000
    edits: int = 100_000
    languages: int = 1_000
    neurons: int = 1_000_000
    width: int = 1_000_000

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise FormatError(
                    f"Limits({limit.name}=...): expected a whole number from 0, found {value!r}; give an int"
                )
        if self.config_depth > DEEPEST:
            raise FormatError(
                f"Limits(config_depth=...): expected at most {DEEPEST}, found {self.config_depth}; "
                "store deeply nested hyper-parameters as text"
            )

    def check(self, limit: str, found: int, where: str) -> None:
        """Raise `FormatError`, naming the limit and how to raise it, where `found` is above it."""
        if found > getattr(self, limit):
            raise FormatError(f"{where}: {self.refusal(limit, found)}")

    def refusal(self, limit: str, found: int | None = None) -> str:
        """Expected, found and the next step, for something above `limit`; `found` is None where it was not counted."""
        most = getattr(self, limit)
        seen = "more" if found is None else _number(found)
        if limit == "config_depth" and (found is None or found > DEEPEST):
            advice = "no patch set needs that; do not trust the folder"
        else:
            needed = "..." if found is None else _number(found)
            advice = f"a set you trust is read with xpatch.load(folder, limits=xpatch.Limits({limit}={needed}))"
        return f"expected at most {most} {_MEANING[limit]} (limit {limit!r}), found {seen}; {advice}"


DEFAULT = Limits()


def _number(value: int) -> str:
    return str(value) if value < 10**30 else "over 10**30"
