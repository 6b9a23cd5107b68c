"""`xpatch demo`: the whole job on the bundled verifier in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xpatch.cli.console import stdout
from xpatch.cli.inputs import check_out_file, check_writable, quiet_transformers
from xpatch.errors import XpatchError

DEFAULT_EDITS = 240


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the patches, the ONNX files and the report.")] = Path(
        "demo-out"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this JSON file.")] = None,
    edits: Annotated[int, typer.Option(min=2, help="Claims in the edit set.")] = DEFAULT_EDITS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training.")] = 0,
) -> None:
    """Edit the bundled claim verifier in six languages, compare four methods, undo, export, and write a report.

    Example: xpatch demo --out demo-out --json demo-out/demo.json
    """
    check_writable(out)
    if out.is_file():
        raise XpatchError(f"--out {out} is a file; give a folder")
    if json_file is not None:
        check_out_file(json_file, "--json")
    from xpatch import demo as steps
    from xpatch.benchmarks import machine

    with quiet_transformers():
        result = steps.run(out, edits=edits, seed=seed, console=stdout())
    if json_file is not None:
        machine.write_json(result, json_file)
        stdout().print(f"{json_file}", markup=False)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)
