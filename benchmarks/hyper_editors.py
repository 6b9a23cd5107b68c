"""Trained editors (KnowledgeEditor, MEND, LiME) for the bundled verifier: their training, and what they reach on validation facts.

    python -m xpatch.benchmarks.hyper_editors --json benchmarks/results/hyper_editors.json

Editors are trained on the verifier's classification facts alone, half of the edits flips, and kept in a folder beside the result that
git ignores (`hyper_editors.work/METHOD-MODE`); an interrupted training goes on, a finished one is used again:
`xpatch.edit(..., method="mend", editor="benchmarks/results/hyper_editors.work/mend-en-all")`.

    python -m xpatch.benchmarks.hyper_editors --base benchmarks/results/crosslingual.work/bases/zh --editors ke:en-en mend:en-en

trains editors for a base fine-tuned in another language (`bases.py`), for XME's matrices: an editor belongs to the weights it was
trained on. They are kept in a folder of the base's name. Without `--json` nothing is measured.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xpatch
from xpatch import EditRequest, Version, zoo
from xpatch.patches.requests import Probe
from xpatch.zoo.verifier import data

from . import bases, machine
from .hyper_measure import alone, asked_of, together
from .progress import steps
from .protocol import INVERSE, TRAINED

WORK = Path(__file__).parent / "results" / "hyper_editors.work"
# Languages of the edit's input and of the texts that must follow (and of those that must stay).
MODES = {"en-en": ("own", "own"), "en-all": ("own", "all"), "all-all": ("all", "all")}
# The editor the cross-lingual benchmark uses for each method: the paper's own for KE and MEND, LiME's for LiME.
CHOSEN = {"ke": "en-en", "mend": "en-en", "lime-ke": "en-all", "lime-mend": "en-all"}
EDITORS = (
    "mend:en-en", "lime-mend:en-all", "ke:en-en", "lime-ke:en-all", "mend:en-all", "lime-mend:all-all", "mend:all-all",
    "lime-mend:en-en",
)  # fmt: skip
SALTS = ("", "editor-1", "editor-2")  # false claims per fact
HELD = 0.12  # share of the training subjects that choose the best checkpoint


def training_requests() -> tuple[list[EditRequest], list[EditRequest]]:
    """(training, held out for choosing the checkpoint): claims about the verifier's classification facts, in six languages.

    The two share no subject. Facts that are stated the other way round in another split are left out, so are claims that read like
    one there (two subjects may share a name), and the wordings that locality is measured in.
    """
    others = ("edit", "validation", "test")
    taken = {text for split in others for item in data.claims(split) for texts in item.texts.values() for text in texts}
    elsewhere = {(fact.relation, fact.object, fact.subject) for fact in data.facts() if fact.split != "train"}
    found: tuple[list[EditRequest], list[EditRequest]] = ([], [])
    for fact in data.facts("train"):
        if fact.relation in INVERSE and (INVERSE[fact.relation], fact.subject, fact.object) in elsewhere:
            continue
        place = int(hashlib.sha1(f"editor:{fact.subject}".encode()).hexdigest()[:8], 16) / 2**32
        claims = [data.claim(fact, True), *(data.claim(fact, False, salt) for salt in SALTS)]
        known: set[str] = set()
        for item in claims:
            if item is None or any(text in taken for texts in item.texts.values() for text in texts):
                continue
            if item.texts["en"][0] not in known:
                known.add(item.texts["en"][0])
                found[place < HELD].append(_request(item))
    return found


def _request(item: data.Claim) -> EditRequest:
    versions = {
        language: Version(text=texts[0], rephrases=tuple(Probe(text=texts[index]) for index in TRAINED))
        for language, texts in item.texts.items()
    }
    return EditRequest(id=item.id, target=item.label, versions=versions)


def train(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    work: str | Path = WORK,
    preset: str = "default",
    seed: int = 0,
    progress: Any = None,
    **overrides: Any,
) -> Any:
    """Train the editor "METHOD:MODE" into `work`, or go on with it, or use it again; what `xpatch.train_editor` returns."""
    method, _, mode = name.partition(":")
    inner, outer = MODES[mode]
    requests, held = training_requests()
    folder = Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    return xpatch.train_editor(
        model,
        tokenizer,
        requests,
        method,
        out=folder / f"{method}-{mode}",
        preset=preset,
        validation=held,
        seed=seed,
        progress=progress,
        **{"edit_languages": inner, "outer_languages": outer, **overrides},
    )


def editor(method: str, work: str | Path = WORK) -> str:
    """The folder of the editor the cross-lingual benchmark uses for `method`."""
    return str(Path(work) / f"{method}-{CHOSEN[method]}")


def run(
    out: str | Path | None = None,
    *,
    editors: Sequence[str] = EDITORS,
    edits: int | None = None,
    work: str | Path = WORK,
    seed: int = 0,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    base: str | Path | None = None,
    measured: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Train `editors` and measure each on the verifier's validation facts; JSON values, written to `out` when it is given.

    edits: limit for a quick look. base: folder of a base of `bases.py` in place of the bundled verifier; its editors are kept in
    `work / NAME`. measured: False only trains. overrides: settings of the training. Raises `FormatError` for an editor or a base there
    is not.
    """
    unknown = [name for name in editors if name.partition(":")[0] not in CHOSEN or name.partition(":")[2] not in MODES]
    if unknown:
        raise xpatch.FormatError(
            f"there is no editor {unknown[0]!r}; expected METHOD:MODE with a method of {', '.join(CHOSEN)} and a mode of {', '.join(MODES)}"
        )
    model, tokenizer = zoo.load("verifier") if base is None else bases.load(Path(base))
    work = Path(work) if base is None else Path(work) / Path(base).name
    rows, asked = [], asked_of(model, tokenizer, edits) if measured else None
    with steps(progress, len(editors)) as step:
        for name in editors:
            step.begin(name)
            training = train(name, model, tokenizer, work=work, seed=seed, progress=step.report, **overrides)
            method = name.partition(":")[0]
            if asked is None:
                step.end()
                continue
            rows.append(
                {
                    "editor": name,
                    "steps": training.steps,
                    "best_step": training.best_step,
                    "validation": dict(training.history[-1]) if training.history else {},
                    "alone": alone(model, tokenizer, method, training.folder, asked, step.report),
                    "together": together(model, tokenizer, method, training.folder, asked, step.report),
                }
            )
            step.end()
    result = {
        "benchmark": "hyper_editors",
        "unit": "percent",
        "header": machine.header([seed], command),
        "overrides": overrides,
        "rows": rows,
    }
    if out is not None:
        machine.write_json(result, Path(out))
    return result


def main() -> None:
    """The command line of `python -m xpatch.benchmarks.hyper_editors`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="result file; without it editors are trained and not measured")
    parser.add_argument("--base", type=Path, help="a base made by bases.py instead of the bundled verifier")
    parser.add_argument("--editors", nargs="+", default=list(EDITORS))
    parser.add_argument("--edits", type=int)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args()
    if found.json is None and found.edits is not None:
        parser.error("--edits is for what is measured; give --json as well")
    run(
        found.json, editors=found.editors, edits=found.edits, work=found.work, seed=found.seed, base=found.base,
        measured=found.json is not None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
