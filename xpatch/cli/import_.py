"""`xpatch import`: the way back from `xpatch export adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xpatch.cli.console import print_json, stdout
from xpatch.cli.inputs import check_out_folder


def import_(
    adapter: Annotated[Path, typer.Argument(help="File that `xpatch export adapter` wrote (.onnx_adapter).")],
    out: Annotated[Path, typer.Option(help="Patch folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the patch set in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the patch folder that an ONNX Runtime adapter was made from: same tensors, ledger and fingerprint. Signatures stay behind.

    Example: xpatch import fixes.onnx_adapter --out fixes
    """
    import xpatch
    from xpatch import exporters

    check_out_folder(out, overwrite=overwrite)
    patches = exporters.read_adapter(adapter)
    xpatch.save(patches, out)
    if as_json:
        print_json({"out": str(out), "edits": len(patches.edits), "fingerprint": patches.fingerprint})
    else:
        stdout().print(
            f"{out}: edits: {len(patches.edits)}, fingerprint {patches.fingerprint[:12]}", markup=False, highlight=False
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="import")(import_)
