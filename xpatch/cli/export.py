"""`xpatch export base | adapter`: a model with places for patches in ONNX, and a patch folder as an ONNX Runtime adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.console import print_json, stdout
from xpatch.cli.inputs import check_out_file, check_writable, load_classifier, quiet_transformers
from xpatch.errors import XpatchError

commands = typer.Typer(help="Write ONNX files.", no_args_is_help=True, rich_markup_mode="rich")


@commands.callback()
def export() -> None:
    """Write ONNX files: a base model with optional patch inputs, or a patch folder as an adapter for it."""


@commands.command()
def base(
    model: Annotated[str, typer.Option(help="Folder of a Hugging Face sequence classifier, or 'verifier'.")],
    out: Annotated[Path, typer.Option(help="Folder to write: model.onnx, its description, the tokenizer.")],
    activation: Annotated[
        str, typer.Option(help="Activation of the patch neurons it will take; fixed in the graph.")
    ] = "relu",
    languages: Annotated[str | None, typer.Option(help="Fix the order of language masks: en,de,zh.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export a model once, with its patches as optional inputs; checked against the PyTorch model before it is put in place.

    Example: xpatch export base --model my-model --out onnx
    """
    from xpatch import exporters

    check_writable(out)
    order = None if languages is None else [word.strip() for word in languages.split(",") if word.strip()]
    classifier, tokenizer = load_classifier(model)
    with quiet_transformers():
        folder = exporters.export_base(classifier, out, tokenizer=tokenizer, activation=activation, languages=order)
    _show(folder, folder / "model.onnx", as_json)


@commands.command()
def adapter(
    patches: Annotated[str, typer.Argument(help="Patch folder (or hf:// or another fsspec URL).")],
    base: Annotated[Path, typer.Option(help="Folder that `xpatch export base` wrote for the same model.")],
    out: Annotated[Path, typer.Option(help="File to write, by custom ending in .onnx_adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a patch folder as an ONNX Runtime adapter (1.20 or newer) for an exported base.

    Example: xpatch export adapter fixes --base onnx --out fixes.onnx_adapter
    """
    import xpatch
    from xpatch import exporters

    if not base.is_dir():
        raise XpatchError(f"--base {base} does not exist; write it with xpatch export base --model DIR --out {base}")
    check_out_file(out)
    patch_set = xpatch.load(patches)
    made = exporters.export_adapter(patch_set, base, out)
    _show(made, made, as_json)


def _show(path: Path, file: Path, as_json: bool) -> None:
    found: dict[str, Any] = {"out": str(path), "bytes": file.stat().st_size}
    if as_json:
        print_json(found)
    else:
        stdout().print(f"{path}: {found['bytes'] / 1024:.1f} KiB", markup=False)


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(commands, name="export")
