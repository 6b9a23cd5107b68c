"""Which runs the cross-lingual tables consist of, as data: to add a row, add a line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xpatch

LANGUAGES = ("en", "de", "fr", "es", "zh", "ar")
PRESETS = ("paper", "default")


@dataclass(frozen=True)
class Row:
    """One row of a table: a method with a preset, and what sets it apart from the method's other rows.

    settings: replace single settings of the preset. languages: the patch is trained on these alone (None: the method's own rule).
    editor: name of a trained editor's folder in the folder of editors; it becomes the setting `editor`.
    alone: also measured one edit at a time, the protocol of the papers whose edits are made independently.
    seeded: False where the seed decides nothing; one run is enough.
    """

    method: str
    preset: str | None = None
    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    languages: tuple[str, ...] | None = None
    editor: str | None = None
    alone: bool = False
    seeded: bool = True

    @property
    def key(self) -> str:
        """The row's name as part of a file name."""
        return re.sub(r"[^\w-]+", "_", "-".join(filter(None, (self.method, self.preset, self.label))))

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        """The seeds this row is run with."""
        return list(seeds) if self.seeded else [seeds[0]]


ORIGINAL = Row("original", seeded=False)

# MPN's Table 1, and every method since.
TABLE: tuple[Row, ...] = (
    ORIGINAL,
    Row("ft", "paper"),
    Row("ft", "default"),
    Row("ft", "default", "all languages", {"train_languages": "all"}),
    Row("ft-l", "paper"),
    Row("ft-l", "default"),
    Row("calinet", "paper"),
    Row("calinet", "default"),
    Row("grace", "paper"),
    Row("grace", "default"),
    Row("grace", "default", "all languages", {"train_languages": "all"}),
    Row("ke", "default", editor="ke-en-en", alone=True, seeded=False),
    Row("mend", "default", editor="mend-en-en", alone=True, seeded=False),
    Row("mend", "default", "trained across languages", editor="mend-en-all", alone=True, seeded=False),
    Row("lime-ke", "default", editor="lime-ke-en-all", alone=True, seeded=False),
    Row("lime-mend", "default", editor="lime-mend-en-all", alone=True, seeded=False),
    Row("t-patcher", "paper"),
    Row("t-patcher", "default"),
    Row("mpn-only", "paper"),
    Row("mpn-only", "default"),
    Row("mpn", "paper"),
    Row("mpn", "default"),
    Row("mpn-masked", "default"),
)

# MPN's Table 3: the same rows, on claims that are wrong in every language.
ALL_WRONG = TABLE


def _left_out(method: str, without: Sequence[str]) -> list[Row]:
    """A method trained on two languages, on all but one, for each of `without`, and on all."""
    chosen = [("en", "de"), *(tuple(k for k in LANGUAGES if k != left) for left in without), LANGUAGES]
    names = ["en + de", *(f"without {left}" for left in without), "all"]
    return [Row(method, "default", name, languages=kept) for name, kept in zip(names, chosen, strict=True)]


# Languages left out of the patch's training. Transformer-Patcher is trained on English alone by its own rule. Masks were to help the
# distant scripts.
ZERO_SHOT: tuple[Row, ...] = (
    Row("t-patcher", "default", "en", languages=("en",)),
    *_left_out("mpn", ("de", "zh", "ar")),
    *_left_out("mpn-masked", ("zh", "ar")),
)

# XME: an edit stated in one language alone, measured by itself in every language. FT without memory needs no seed. The papers' presets
# keep a hyper-network's edit also where it did not take.
MATRIX: tuple[Row, ...] = (
    Row("ft", "paper", seeded=False),
    Row("ke", "paper", editor="ke-en-en", seeded=False),
    Row("mend", "paper", editor="mend-en-en", seeded=False),
    Row("mend", "paper", "trained in all languages", editor="mend-all-all", seeded=False),
    Row("lime-mend", "paper", "trained in all languages", editor="lime-mend-all-all", seeded=False),
    Row("t-patcher", "default"),
)


def chosen(
    rows: Sequence[Row], methods: Sequence[str] | None, presets: Sequence[str] | None, others: bool = False
) -> list[Row]:
    """The rows of these methods and presets (None: all). others: add methods that the plan does not name, in both presets.

    Raises `FormatError` for a method that neither the plan nor the registry has.
    """
    known = xpatch.methods()
    planned = {row.method for row in rows}
    for method in methods or ():
        if method not in planned and method not in known and method != "original":
            raise xpatch.FormatError(f"there is no method {method!r}; methods: {', '.join(('original', *known))}")
    more = [
        Row(method, preset)
        for method, info in known.items()
        if method not in planned and (others if methods is None else method in methods)
        for preset in PRESETS
        if preset in info.presets
    ]
    return [
        row
        for row in (*rows, *more)
        if (methods is None or row.method in methods) and (presets is None or row.preset in (None, *presets))
    ]


def ready(row: Row, editors: Path | None) -> tuple[Row, str | None]:
    """The row with its editor's folder filled in, and why it cannot be run (None: it can)."""
    if row.method == "original":
        return row, None
    info = xpatch.methods().get(row.method)
    if info is None:
        return row, "this version has no such method"
    if row.preset not in info.presets:
        return row, f"the method has no preset {row.preset!r}"
    if row.editor is None:
        return row, None
    folder = None if editors is None else editors / row.editor
    if folder is None or not folder.is_dir():
        return row, f"no trained editor at {folder}" if folder else "no folder of trained editors was given"
    return dataclasses.replace(row, settings={**row.settings, "editor": str(folder)}), None
