"""`xpatch edit`: train the edits of a JSONL file, or those of an existing patch set again, and write a patch folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.any_model import load_editable
from xpatch.cli.console import print_json, printable, say, stderr, stdout, table
from xpatch.cli.inputs import (
    check_method,
    check_out_file,
    check_out_folder,
    check_writable,
    settings_of,
    split_languages,
)
from xpatch.errors import XpatchError

SHOWN_FAILURES = 20


def edit(
    *,
    model: Annotated[
        str, typer.Option(help="Folder of a Hugging Face sequence classifier or language model, or 'verifier'.")
    ],
    requests: Annotated[Path | None, typer.Option(help="JSONL file, one edit request a line.")] = None,
    from_set: Annotated[
        str | None, typer.Option("--from", help="Patch folder or URL whose own requests are trained again.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Patch folder to write.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="How to edit: mpn (the default), mpn-only, mpn-masked, t-patcher, ft, ft-l, calinet, grace, ke, mend, lime-ke or lime-mend; "
            "with --from, as recorded."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="'default', or 'paper' for the published settings; with --from, as recorded.")
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(help="JSONL of texts that must stay as they are: {language, text}.")
    ] = None,
    editor: Annotated[
        Path | None,
        typer.Option(help="Folder of a trained editor, for ke, mend, lime-ke and lime-mend: see xpatch train-editor."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE: a setting of the preset replaced; as often as needed."),
    ] = None,
    languages: Annotated[str | None, typer.Option(help="Only these languages of the requests: en,de,zh.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training: 0; with --from, as recorded.")] = None,
    old_model: Annotated[
        str | None, typer.Option(help="With --from: the old base, to say what held there and is lost on the new one.")
    ] = None,
    skip_redacted: Annotated[
        bool,
        typer.Option("--skip-redacted", help="With --from: redacted edits, which cannot be trained, are no failure."),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder to keep what is trained in: the same command goes on from it after an interruption."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="With --from: write what holds, edit by edit, to this JSON file.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a patch set that --out already holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train edits on a model folder and write them as a patch folder. The model is not changed.

    A request that cannot be tried (no label of the model, no text, a contradiction or a repetition of another) is named and left
    out. Exit code 0: something was edited, or all was right already; 1: nothing was edited (the folder is written, its ledger says
    why); 2: bad input.

    A request line: {"id": "1", "text": "The claim.", "target": "REFUTES", "parallel": {"de": "Die Behauptung."}}
    For a language model the target is what it should say: {"id": "1", "text": "The capital of France is", "target": "Lyon"}

    With --from, the requests in a patch set's ledger are trained again on an upgraded model, each as it was recorded, and what no
    longer holds is listed. Then exit code 0: every edit holds; 1: an edit failed, a text that was right before is wrong now, or edits
    were redacted (see --skip-redacted); 2: bad input. Expired edits are left out.

    Example: xpatch edit --model my-model --requests fixes.jsonl --method mpn --out fixes

    Example, for hours of work: xpatch edit --model my-model --requests many.jsonl --checkpoint half-done --out fixes

    Example: xpatch edit --from fixes --model new-model --old-model my-model --out new-fixes
    """
    if (requests is None) == (from_set is None):
        raise XpatchError(
            "give either --requests FILE (new edits) or --from SET (a patch set's edits, on another model)"
        )
    for name, value in (("--old-model", old_model), ("--skip-redacted", skip_redacted), ("--report", report)):
        if value and from_set is None:
            raise XpatchError(f"{name} goes with --from SET; leave it out with --requests")
    import xpatch
    from xpatch.patches.requests import read_requests

    earlier = xpatch.load(from_set) if from_set is not None else None
    if earlier is not None:
        wanted = [record.request for record in earlier.edits if record.request is not None]
    else:
        wanted = read_requests(requests)  # type: ignore[arg-type]  # one of the two was given
    if method is not None:
        check_method(method)
    chosen = split_languages(languages, wanted)
    check_out_folder(out, overwrite=overwrite)
    if report is not None:
        check_out_file(report, "--report")
    if checkpoint is not None:
        check_writable(checkpoint, "--checkpoint")
        if checkpoint.resolve() == out.resolve():
            raise XpatchError(f"--checkpoint {checkpoint} is --out too; give it a folder of its own")
    trained: dict[str, Any] = {**settings_of(settings or ()), **({} if editor is None else {"editor": editor})}
    old = load_editable(old_model) if old_model is not None else None
    editable, tokenizer = load_editable(model)
    if earlier is None:
        method, preset = method or "mpn", preset or "default"
        say(f"{len(wanted)} requests, method {method} ({preset}), model {model}")
        with _to_go_on(checkpoint):
            patches = xpatch.edit(
                editable,
                tokenizer,
                wanted,
                method=method,
                preset=preset,
                memory=memory,
                seed=seed or 0,
                languages=chosen,
                checkpoint=checkpoint,
                **trained,
            )
        xpatch.save(patches, out)
        _show(patches, out, as_json)
        statuses = {record.status for record in patches.edits}
        if "edited" not in statuses and statuses != {"already-right"}:
            raise typer.Exit(1)
        return
    say(f"{len(earlier)} edits of {from_set}, model {model}")
    with _to_go_on(checkpoint):
        again = xpatch.retrain(
            earlier,
            editable,
            tokenizer,
            method=method,
            preset=preset,
            seed=seed,
            memory=memory,
            languages=chosen,
            old=old,
            checkpoint=checkpoint,
            **trained,
        )
    xpatch.save(again.patches, out)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        again.report.to_json(report)
    _show_again(again, out, as_json)
    if not again.report.holds or (again.report.having("redacted") and not skip_redacted):
        raise typer.Exit(1)


@contextmanager
def _to_go_on(checkpoint: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint is None:
            raise
        stderr().print(f"xpatch: interrupted; the same command goes on from {checkpoint}", markup=False)
        raise typer.Exit(130) from None


def _show(patches: Any, out: Path, as_json: bool) -> None:
    counts = Counter(record.status for record in patches.edits)
    if as_json:
        edits = [
            {"id": record.id, "status": record.status, "message": record.message, "seconds": record.seconds}
            for record in patches.edits
        ]
        print_json({**_written(patches, out), "status": dict(counts), "edits": edits})
        return
    for record in patches.edits:
        if record.status == "rejected":
            stdout().print(printable(f"rejected {record.id}: {record.message}"), markup=False, soft_wrap=True)
    _list("not edited", [record for record in patches.edits if record.status in ("failed", "lost")])
    _summary(patches, out, counts)


def _show_again(again: Any, out: Path, as_json: bool) -> None:
    report = again.report
    counts = Counter(edit.status for edit in report.edits)
    if as_json:
        found = report.model_dump(mode="json")
        print_json({**_written(again.patches, out), "status": dict(counts), "holds": report.holds, "report": found})
        return
    stdout().print(report.table())
    _list("no longer hold", report.having("failed", "lost"))
    _list("not trained", report.having("rejected", "redacted", "expired"))
    _summary(again.patches, out, counts)


def _list(what: str, edits: Any) -> None:
    if edits:
        shown = [(edit.id, edit.status, edit.message) for edit in edits[:SHOWN_FAILURES]]
        more = f", the first {SHOWN_FAILURES}" if len(edits) > SHOWN_FAILURES else ""
        stdout().print(table(f"{len(edits)} {what}{more}", ("id", "status", "why"), shown))


def _summary(patches: Any, out: Path, counts: Counter[str]) -> None:
    listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    size = _written(patches, out)["bytes"] / 1024
    stdout().print(f"{out}: {listed}; {size:.1f} KiB, fingerprint {patches.fingerprint}", markup=False)


def _written(patches: Any, out: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in out.iterdir())
    return {"out": str(out), "fingerprint": patches.fingerprint, "bytes": size}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(edit)
