"""`xpatch diff`: which predictions a patch set changes; `xpatch check`: which edits contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.console import print_json, stdout, table
from xpatch.cli.inputs import check_out_file, load_classifier

SHOWN_CHARACTERS = 60
ModelOption = Annotated[str, typer.Option(help="Folder of a Hugging Face sequence classifier, or 'verifier'.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def diff(
    model: ModelOption,
    patches: Annotated[str, typer.Option(help="Patch folder; a second folder after it takes its place.")],
    texts: Annotated[
        Path, typer.Option(help="JSONL of {text, language?, text_pair?} (.jsonl), or plain text, one text a line.")
    ],
    other: Annotated[
        str | None,
        typer.Argument(metavar="[B]", help="Second patch folder: compare it with the first, not with the base."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List every text, not only those whose answer changes.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the rows to this CSV file.")] = None,
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Show which predictions a patch folder changes: text, answer and probability before and after, and the edits that fired.

    Example: xpatch diff --model my-model --patches fixes --texts traffic.jsonl

    Example: xpatch diff --model my-model --patches fixes-v1 fixes-v2 --texts traffic.jsonl --out changes.csv
    """
    from xpatch.editors.progress import reporting
    from xpatch.watch import diff as compare
    from xpatch.watch.texts import as_texts

    asked = as_texts(texts)
    if out is not None:
        check_out_file(out)
    classifier, tokenizer = load_classifier(model)
    with reporting(None) as report:
        found = compare(classifier, tokenizer, patches, other, texts=asked, batch_size=batch_size, progress=report)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found.to_csv(out, all=everything)
    if as_json:
        print_json(found.to_dict(all=everything))
        return
    rows = [_diff_row(row) for row in (found.rows if everything else found.changes)]
    console = stdout()
    if rows:
        console.print(table("predictions", ("text", "language", "before", "after", "fired"), rows))
    languages = ", ".join(f"{code} {changed} of {asked}" for code, (changed, asked) in found.by_language.items())
    console.print(f"{len(found)} of {len(found.rows)} predictions change ({languages})", markup=False)


def check(
    patches: Annotated[str, typer.Argument(metavar="A", help="Patch folder.")],
    model: ModelOption,
    other: Annotated[
        str | None,
        typer.Argument(metavar="[B]", help="Patch folder that is served already: look for conflicts with it too."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts to ask, as for diff; by default those of the edits themselves.")
    ] = None,
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Look for edits that contradict each other: one claim with two targets, or edits that pull one answer apart.

    Exit code 1 where there are any.

    Example: xpatch check fixes --model my-model

    Example: xpatch check new-fixes fixes --model my-model --texts traffic.jsonl
    """
    import xpatch
    from xpatch.editors.progress import reporting
    from xpatch.watch import check as find
    from xpatch.watch.texts import as_texts

    asked = as_texts(texts) if texts is not None else None
    classifier, tokenizer = load_classifier(model)
    if other is not None:
        xpatch.apply(classifier, xpatch.load(other), name=other, tokenizer=tokenizer)
    with reporting(None) as report:
        found = find(patches, classifier, tokenizer, asked, name=patches, batch_size=batch_size, progress=report)
    if as_json:
        print_json(found.to_dict())
    else:
        stdout().print(str(found), markup=False)
    raise typer.Exit(0 if found.ok else 1)


def _diff_row(row: Any) -> tuple[Any, ...]:
    text = row.text if row.text_pair is None else f"{row.text} | {row.text_pair}"
    short = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    before, after = f"{row.before} {row.probability_before:.3f}", f"{row.after} {row.probability_after:.3f}"
    return short, row.language, before, after, " ".join(row.fired_after)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(diff)
    app.command()(check)
