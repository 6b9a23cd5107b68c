"""`xpatch train-editor`: train a hyper-network (KnowledgeEditor, MEND, LiME) that `xpatch edit --editor` then edits with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.console import print_json, say, stdout, table
from xpatch.cli.inputs import check_writable, load_classifier, settings_of

SHARES = ("right", "flips_right", "kept")


def train_editor(
    *,
    model: Annotated[str, typer.Option(help="Folder of a Hugging Face sequence classifier, or 'verifier'.")],
    requests: Annotated[Path, typer.Option(help="JSONL file of facts to practise on, one edit request a line.")],
    out: Annotated[Path, typer.Option(help="Folder for the editor; an interrupted training in it goes on.")],
    method: Annotated[str, typer.Option(help="Which editor: mend, ke, lime-mend or lime-ke.")] = "mend",
    preset: Annotated[str, typer.Option(help="'default', or 'paper' for the published settings.")] = "default",
    validation: Annotated[
        Path | None,
        typer.Option(help="JSONL of other facts that choose the best checkpoint; else a share is kept apart."),
    ] = None,
    locality: Annotated[
        Path | None, typer.Option(help="JSONL of further texts that must stay as they are: {language, text}.")
    ] = None,
    edit_languages: Annotated[
        str | None, typer.Option(help="Languages edits are written in: own (of the request), all, or en,de,zh.")
    ] = None,
    outer_languages: Annotated[
        str | None, typer.Option(help="Languages an edit must hold in: own (of the edit), all, or en,de,zh.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; by default the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as NAME=VALUE (JSON); may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train an editor for a model folder. The model is not changed; a GPU is used where there is one.

    The requests' versions are parallel texts, their rephrases hold with the edit, all other requests' texts must stay. Targets are
    not needed: half of the edits practised ask for another label than the model's own. Call it again to go on after an interruption.

    Example: xpatch train-editor --model my-model --requests facts.jsonl --method lime-mend --outer-languages all --out my-editor

    Then: xpatch edit --model my-model --requests fixes.jsonl --method lime-mend --editor my-editor --out fixes
    """
    import xpatch
    from xpatch.patches.requests import read_requests

    data = read_requests(requests)
    held = read_requests(validation) if validation is not None else None
    check_writable(out)
    chosen: dict[str, Any] = settings_of(settings or ())
    for name, value in (
        ("edit_languages", _languages(edit_languages)),
        ("outer_languages", _languages(outer_languages)),
        ("steps", steps),
    ):
        if value is not None:
            chosen[name] = value
    classifier, tokenizer = load_classifier(model)
    say(f"{len(data)} requests, method {method} ({preset}), model {model}")
    found = xpatch.train_editor(
        classifier,
        tokenizer,
        data,
        method,
        out=out,
        preset=preset,
        validation=held,
        locality=locality,
        seed=seed,
        **chosen,
    )
    best = next((entry for entry in found.history if entry["step"] == found.best_step), {})
    if as_json:
        print_json(
            {
                "out": str(out),
                "method": method,
                "steps": found.steps,
                "best_step": found.best_step,
                "skipped": found.skipped,
                "seconds": round(found.seconds, 3),
                "validation": {name: value if value == value else None for name, value in best.items()},
            }
        )
        return
    rows = [
        [int(entry["step"]), f"{entry['loss']:.4f}", *(f"{100 * entry[name]:.1f}" for name in SHARES)]
        for entry in found.history
    ]
    headings = ("step", "loss", "edits right %", "flips right %", "others unchanged %")
    stdout().print(table("held-out edits, each on the base alone", headings, rows, headings))
    stdout().print(f"{out}: {method}, best at step {found.best_step} of {found.steps}", markup=False)


def _languages(text: str | None) -> Any:
    if text is None or text in ("own", "all"):
        return text
    return tuple(word.strip() for word in text.split(",") if word.strip())


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train-editor")(train_editor)
