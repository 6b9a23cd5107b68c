"""`xpatch store …`: publish patch sets, see what is served and since when, go back, compare, tidy up."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.console import print_json, say, stdout, table
from xpatch.cli.inputs import check_out_folder, load_classifier
from xpatch.errors import XpatchError

commands = typer.Typer(
    help="Publish patch sets and move pointers between them.", no_args_is_help=True, rich_markup_mode="rich"
)

Store = Annotated[
    str, typer.Argument(help="Folder or fsspec URL (s3://bucket/path); credentials come from the environment.")
]
Pointer = Annotated[str, typer.Option(help="Name of the pointer.")]
Message = Annotated[str | None, typer.Option("--message", "-m", help="Why, for the history.")]
Author = Annotated[str | None, typer.Option(help="Who, for the history (default: your user name).")]
Expect = Annotated[
    str | None, typer.Option(help="Move only if the pointer names this set now (a fingerprint; 'none': a new pointer).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@commands.callback()
def store() -> None:
    """Publish patch sets and move pointers between them: what serves reads a pointer, what went wrong is rolled back."""


@commands.command("list")
def list_(store: Store, as_json: Json = False) -> None:
    """Show every pointer with its newest move, and every set.

    Example: xpatch store list s3://team/patches
    """
    found = _open(store).list()
    if as_json:
        print_json(asdict(found))
        return
    pointers = [(m.pointer, m.after[:12], m.time, m.author, m.message) for m in found.pointers]
    stdout().print(table(found.url, ("pointer", "set", "since", "by", "message"), pointers))
    sets = [
        (
            item.fingerprint[:12],
            item.name,
            item.published or "not published",
            item.edits,
            " ".join(item.languages),
            f"{item.nbytes / 1024:.1f}",
            "damaged: see xpatch store verify" if item.problem else " ".join(item.pointers),
        )
        for item in found.sets
    ]
    headings = ("set", "name", "published", "edits", "languages", "KiB", "pointers")
    stdout().print(table("sets", headings, sets, numbers=("edits", "KiB")))


@commands.command()
def publish(
    store: Store,
    patches: Annotated[str | None, typer.Argument(help="Patch folder (or URL) to publish.")] = None,
    from_ref: Annotated[
        str | None, typer.Option("--from", help="Instead of a folder: a set of the store, by pointer or fingerprint.")
    ] = None,
    pointer: Pointer = "production",
    message: Message = None,
    author: Author = None,
    expect: Expect = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of the classifier it is for, or 'verifier': check the fit first.")
    ] = None,
    must_not_change: Annotated[
        Path | None, typer.Option(help="JSONL of texts whose prediction must stay the base's: {text, language}.")
    ] = None,
    must_hold: Annotated[
        Path | None, typer.Option(help="JSONL of texts that must give their target: {text, target}, or edit requests.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a patch set into a store and let a pointer name it. With --model it is tried out first, and refused if it fails.

    Example: xpatch store publish STORE fixes/ --message "capital of X" --model DIR --must-not-change keep.jsonl --must-hold fixes.jsonl
    """
    from xpatch.editors.progress import reporting

    if (patches is None) == (from_ref is None):
        raise XpatchError("give either a patch folder or --from REF: what is to be published")
    if model is None and (must_not_change is not None or must_hold is not None):
        raise XpatchError("--must-not-change and --must-hold need --model: the classifier to ask")
    import xpatch

    place = _open(store)
    chosen = xpatch.load(patches) if patches is not None else place.get(from_ref or "")
    classifier, tokenizer = load_classifier(model) if model is not None else (None, None)
    options: dict[str, Any] = {} if expect is None else {"expect": None if expect == "none" else expect}
    with reporting(None) as report:
        move = place.publish(
            chosen,
            pointer,
            message,
            author,
            **options,
            model=classifier,
            tokenizer=tokenizer,
            must_not_change=must_not_change,
            must_hold=must_hold,
            progress=report,
        )
    _show(move, as_json)


@commands.command()
def rollback(
    store: Store,
    pointer: Pointer = "production",
    steps: Annotated[int, typer.Option(min=1, help="How many published sets to go back.")] = 1,
    to: Annotated[
        str | None, typer.Option(help="Instead of --steps: a set the pointer has named before, by fingerprint.")
    ] = None,
    message: Message = None,
    author: Author = None,
    expect: Expect = None,
    as_json: Json = False,
) -> None:
    """Let a pointer name an earlier set again. The history keeps everything, so this can be undone with --to.

    Example: xpatch store rollback s3://team/patches --message "hurts German"
    """
    options = {} if expect is None else {"expect": expect}
    _show(_open(store).rollback(pointer, steps, to=to, message=message, author=author, **options), as_json)


@commands.command()
def history(
    store: Store,
    pointer: Annotated[str, typer.Argument(help="Name of the pointer.")] = "production",
    as_json: Json = False,
) -> None:
    """Show every move of a pointer, newest first: who, when, why, from which set to which.

    Example: xpatch store history s3://team/patches production
    """
    moves = _open(store).history(pointer)
    if as_json:
        print_json(asdict(moves))
        return
    rows = [
        (m.number, m.time, m.action, (m.before or "")[:12], m.after[:12], m.author, m.message, _checked(m.checked))
        for m in reversed(moves.moves)
    ]
    headings = ("#", "time", "action", "from", "to", "by", "message", "checked")
    stdout().print(table(pointer, headings, rows, numbers=("#",)))


@commands.command()
def diff(
    store: Store,
    before: Annotated[str, typer.Argument(help="A pointer, or the start of a fingerprint.")],
    after: Annotated[str, typer.Argument(help="The set to compare it with.")] = "production",
    as_json: Json = False,
) -> None:
    """Show which edits were added, removed and changed from one set to another, and in which languages.

    Example: xpatch store diff s3://team/patches 3fa9c1 production
    """
    found = _open(store).diff(before, after)
    if as_json:
        print_json({**asdict(found), "languages": found.languages})
    else:
        stdout().print(str(found), markup=False)


@commands.command()
def get(
    store: Store,
    ref: Annotated[str, typer.Argument(help="A pointer, or the start of a fingerprint.")] = "production",
    out: Annotated[Path, typer.Option(help="Patch folder to write.")] = Path("patches"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a patch set that --out already holds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy a set out of a store into a patch folder.

    Example: xpatch store get s3://team/patches production --out fixes
    """
    import xpatch

    check_out_folder(out, overwrite=overwrite)
    patches = _open(store).get(ref)
    xpatch.save(patches, out)
    if as_json:
        print_json({"out": str(out), "fingerprint": patches.fingerprint, "edits": len(patches)})
    else:
        stdout().print(f"{out}: {len(patches)} edits, fingerprint {patches.fingerprint}", markup=False)


@commands.command()
def gc(
    store: Store,
    grace: Annotated[float, typer.Option(min=0, help="Hours that what nobody names is left alone.")] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove sets that no history names, and what interrupted publishers left. What a pointer ever named is kept.

    Example: xpatch store gc s3://team/patches --dry-run
    """
    found = _open(store).gc(timedelta(hours=grace), dry_run)
    if as_json:
        print_json(asdict(found))
    else:
        stdout().print("\n".join([*found.removed, *found.leftovers, str(found)]), markup=False)


@commands.command()
def verify(store: Store, as_json: Json = False) -> None:
    """Load and hash every set and history entry again. Exit code 1 when something is damaged.

    Example: xpatch store verify s3://team/patches
    """
    from xpatch.editors.progress import reporting

    place = _open(store)
    say(f"verifying {place.url}")
    with reporting(None) as report:
        found = place.verify(progress=report)
    if as_json:
        print_json({"ok": found.ok, **asdict(found)})
    else:
        stdout().print(str(found), markup=False)
    raise typer.Exit(0 if found.ok else 1)


def _open(url: str) -> Any:
    from xpatch.store import PatchStore

    return PatchStore(url)


def _show(move: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(move))
    else:
        stdout().print(str(move), markup=False)


def _checked(checked: Any) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in checked.items())


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(commands, name="store")
