"""`xpatch evaluate`: how well edits hold, per language, and what else they changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xpatch.cli.any_model import load_editable
from xpatch.cli.console import print_json, stdout
from xpatch.cli.inputs import check_out_file


def evaluate(
    model: Annotated[
        str, typer.Option(help="Folder of a Hugging Face sequence classifier or language model, or 'verifier'.")
    ],
    cases: Annotated[
        Path, typer.Option(help="JSONL of edit requests with targets; their rephrases count as unseen paraphrases.")
    ],
    patches: Annotated[
        str | None, typer.Option(help="Patch folder; without it the model is measured as it is.")
    ] = None,
    locality: Annotated[
        Path | None, typer.Option(help="JSONL of texts that should not change: {language, text, target}.")
    ] = None,
    locality_train: Annotated[
        Path | None, typer.Option(help="The same, for texts like those the classifier was trained on.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap intervals.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Write the full report, every prediction included, to this JSON file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as one JSON document.")] = False,
) -> None:
    """Measure a model before and with a patch folder: reliability, generality per language, locality. The model is not changed.

    Example: xpatch evaluate --model my-model --cases cases.jsonl --patches fixes
    """
    import xpatch
    from xpatch.patches.requests import read_requests

    wanted = read_requests(cases)
    if out is not None:
        check_out_file(out)
    patch_set = xpatch.load(patches) if patches is not None else None
    asked, tokenizer = load_editable(model)
    report = xpatch.evaluate(
        asked,
        tokenizer,
        wanted,
        patch_set,
        locality_train=locality_train,
        locality_test=locality,
        seed=seed,
        batch_size=batch_size,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        report.to_json(out)
    if as_json:
        print_json(report.model_dump(mode="json", exclude={"predictions"}))
    else:
        stdout().print(report.table())


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)
