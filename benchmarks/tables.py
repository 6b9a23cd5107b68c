"""All cross-lingual tables with one command: `xpatch bench crosslingual`.

| part | file beside `results.json` | what |
|---|---|---|
| `table` | `results.json` itself | MPN's Table 1: every method on one claim a subject |
| `all-wrong` | `results_all_wrong.json` | MPN's Table 3: claims that are wrong in every language |
| `zero-shot` | `results_zero_shot.json` | the same claims, patches trained on some of the languages |
| `matrix` | `results_matrix.json` | XME: edit language x evaluation language, per fine-tuning language of the base |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xpatch
from xpatch import zoo
from xpatch.evaluation import Readings

from . import bases, claims, crosslingual, matrix, plan

PARTS = ("table", "all-wrong", "zero-shot", "matrix")
# A first look: edits, locality claims of each kind and language, edits of the matrix.
QUICK: dict[str, Any] = {"edits": 40, "locality": 60, "matrix_edits": 6, "seeds": (0,)}
MATRIX_EDITS = 100  # in each of the six languages


def run(
    out: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    quick: bool = False,
    edits: int | None = None,
    locality: int | None = None,
    matrix_edits: int | None = None,
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    presets: Sequence[str] | None = None,
    editors: str | Path | None = None,
    bases_folder: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **overrides: Any,
) -> dict[str, dict[str, Any]]:
    """Make the parts and write each to its file as soon as it is finished; part -> result.

    quick: small sizes where none are given. edits, locality, seeds, methods, presets, overrides: as in `crosslingual.run`.
    matrix_edits: edits in each language. editors, bases_folder: where trained editors (`METHOD-MODE`, those of other bases in a folder of the
    base's name) and fine-tuned bases lie, by default `hyper_editors.work` beside `out` and `bases` in the work folder; bases that are missing are made there, in minutes. tell: hears one line a finished part.
    """
    if quick:
        edits, locality = edits or QUICK["edits"], locality or QUICK["locality"]
        matrix_edits, seeds = matrix_edits or QUICK["matrix_edits"], seeds or QUICK["seeds"]
    unknown = sorted(set(parts).difference(PARTS))
    if unknown:
        raise xpatch.FormatError(f"there is no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    out = Path(out)
    work = out.with_suffix(".work")
    trained = Path(editors) if editors else out.with_name("hyper_editors.work")
    made_bases = Path(bases_folder) if bases_folder else work / "bases"
    model, tokenizer = zoo.load("verifier")
    readings = Readings(model, tokenizer)
    seeds = tuple(seeds or crosslingual.SEEDS)
    common: dict[str, Any] = {
        "seeds": seeds, "methods": methods, "presets": presets, "work": work, "progress": progress, "command": command, **overrides,
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        path = path_of(out, part)
        if part == "matrix":
            ready, missing = _bases(
                made_bases, (model, tokenizer, readings), matrix_edits or MATRIX_EDITS, locality, work, tell
            )
            found[part] = matrix.run(path, ready, editors=trained, missing=missing, **common)
        else:
            wrong = part != "table"
            asked = claims.wrong_everywhere(model, tokenizer, edits, locality, folder=work) if wrong else None
            rows = {"table": plan.TABLE, "all-wrong": plan.ALL_WRONG, "zero-shot": plan.ZERO_SHOT}[part]
            found[part] = crosslingual.run(
                path,
                part=part,
                rows=rows,
                edits=edits,
                locality=locality,
                protocol=asked,
                model=model,
                tokenizer=tokenizer,
                readings=readings,
                editors=trained,
                **common,
            )
        skipped = found[part]["skipped"]
        tell(f"{path}: {len(skipped)} skipped" if skipped else f"{path}")
        for row in skipped:
            tell("  " + ", ".join(str(value) for value in row.values() if value))
    return found


def path_of(out: Path, part: str) -> Path:
    """The file of one part, beside `out`, which is the table's."""
    return out if part == "table" else out.with_name(f"{out.stem}_{part.replace('-', '_')}{out.suffix}")


def _bases(
    folder: Path,
    english: tuple[Any, Any, Readings],
    edits: int,
    locality: int | None,
    work: Path,
    tell: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The bundled verifier (fine-tuned in English) and the bases made from it, each with its own claims; and those too good to edit."""
    loaded = {"en": english}
    for name in bases.LANGUAGES:
        other, words = bases.load(bases.make(folder, name, tell=tell))
        loaded[name] = (other, words, Readings(other, words))
    ready: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, (base, words, read) in loaded.items():
        asked = claims.wrong_everywhere(base, words, edits, locality, folder=work)
        if asked.cases:
            ready[name] = (base, words, asked, read)
        else:
            missing[name] = "this base is wrong about no claim in every language"
    return ready, missing
