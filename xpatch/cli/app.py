"""The typer application and `main`, which turns every error into one message on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from xpatch.cli import bench, demo, diff, doctor, edit, evaluate, export, import_, inspect, sign, store, train_editor
from xpatch.cli.console import stderr
from xpatch.errors import XpatchError

app = typer.Typer(
    name="xpatch",
    help="Hot-patch the knowledge of multilingual transformer models: one edit, every language, no redeploy.",
    epilog="Start with: xpatch demo --out demo-out",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        import xpatch

        typer.echo(xpatch.__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="On an error, show the traceback too (allowed anywhere).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hot-patch the knowledge of multilingual transformer models: one edit, every language, no redeploy."""


for module in (demo, edit, train_editor, inspect, evaluate, diff, export, import_, store, sign, bench, doctor):
    module.register(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 a check failed or a defect in xpatch, 2 bad input.

    argv: the words after `xpatch`; `sys.argv[1:]` when None. The console script passes the result to `sys.exit`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return int(app(args=words, prog_name="xpatch", standalone_mode=False) or 0)
    except Exception as error:
        if debug:
            stderr().print_exception(word_wrap=True)
        message, code = _explain(error)
        stderr().print(message, markup=False, style="red" if sys.stderr.isatty() else None)
        return code
    except KeyboardInterrupt:
        stderr().print("xpatch: interrupted; nothing was written")
        return 130


def _explain(error: Exception) -> tuple[str, int]:
    """One message for a person and the exit code. Usage errors are typer's (or click's, in older releases), told by their shape."""
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "xpatch"
        return f"{command}: {error.format_message()} (see {command} --help)", 2
    if isinstance(error, XpatchError):
        return f"xpatch: {error}", 2
    if type(error).__name__ == "Abort":
        return "xpatch: aborted", 130
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"xpatch: {place}{error.strerror or error}", 2
    return (
        f"xpatch: unexpected {type(error).__name__}: {error}\nThis is a defect; run again with --debug and report what it prints.",
        1,
    )
