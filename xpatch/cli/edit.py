"""`xpatch edit`: train the edits of a JSONL file on a model folder and write a patch folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.console import print_json, say, stdout, table
from xpatch.cli.inputs import check_method, check_out_folder, load_classifier, split_languages

SHOWN_FAILURES = 20


def edit(
    model: Annotated[str, typer.Option(help="Folder of a Hugging Face sequence classifier, or 'verifier'.")],
    requests: Annotated[Path, typer.Option(help="JSONL file, one edit request a line.")],
    out: Annotated[Path, typer.Option(help="Patch folder to write.")],
    method: Annotated[str, typer.Option(help="How to edit: mpn, mpn-only, t-patcher or ft.")] = "mpn",
    preset: Annotated[str, typer.Option(help="'default', or 'paper' for the published settings.")] = "default",
    memory: Annotated[
        Path | None, typer.Option(help="JSONL of texts that must stay as they are: {language, text}.")
    ] = None,
    languages: Annotated[str | None, typer.Option(help="Only these languages of the requests: en,de,zh.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a patch set that --out already holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train edits on a model folder and write them as a patch folder. The model is not changed.

    A request line: {"id": "1", "text": "The claim.", "target": "REFUTES", "parallel": {"de": "Die Behauptung."}}

    Example: xpatch edit --model my-model --requests fixes.jsonl --method mpn --out fixes
    """
    import xpatch
    from xpatch.patches.requests import read_requests

    wanted = read_requests(requests)
    check_method(method)
    chosen = split_languages(languages, wanted)
    check_out_folder(out, overwrite=overwrite)
    classifier, tokenizer = load_classifier(model)
    say(f"{len(wanted)} requests, method {method} ({preset}), model {model}")
    patches = xpatch.edit(
        classifier, tokenizer, wanted, method=method, preset=preset, memory=memory, seed=seed, languages=chosen
    )
    xpatch.save(patches, out)
    _show(patches, out, as_json)


def _show(patches: Any, out: Path, as_json: bool) -> None:
    counts = Counter(record.status for record in patches.edits)
    size = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        edits = [
            {"id": record.id, "status": record.status, "message": record.message, "seconds": record.seconds}
            for record in patches.edits
        ]
        print_json(
            {"out": str(out), "fingerprint": patches.fingerprint, "bytes": size, "status": dict(counts), "edits": edits}
        )
        return
    failed = [record for record in patches.edits if record.status in ("failed", "lost")]
    if failed:
        shown = [(record.id, record.status, record.message) for record in failed[:SHOWN_FAILURES]]
        stdout().print(table(f"{len(failed)} not edited", ("id", "status", "why"), shown))
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    stdout().print(f"{out}: {summary}; {size / 1024:.1f} KiB, fingerprint {patches.fingerprint}", markup=False)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(edit)
