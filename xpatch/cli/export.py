"""`xpatch export base | quantized | adapter | verify | widened | merged | peft`: patches in the formats that servers read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.cases import read_cases
from xpatch.cli.console import print_json, stdout
from xpatch.cli.inputs import check_out_file, check_writable, quiet_transformers
from xpatch.errors import XpatchError

CHECK = "Load what was written and compare it with the patched model before it is put in place; takes a second model's memory."
commands = typer.Typer(
    help="Write ONNX files, plain checkpoints and PEFT adapters.", no_args_is_help=True, rich_markup_mode="rich"
)


@commands.callback()
def export() -> None:
    """Write a model and its patches for other servers: ONNX with patches as optional inputs, plain checkpoints, PEFT adapters."""


@commands.command()
def base(
    model: Annotated[str, typer.Argument(help="Folder of a classifier or language model, or 'verifier'.")],
    out: Annotated[Path, typer.Option(help="Folder to write: the graphs, their description, the tokenizer.")],
    site: Annotated[
        list[str] | None, typer.Option(help="FFN that takes neurons; may be given again (default: the final one).")
    ] = None,
    linear: Annotated[
        list[str] | None,
        typer.Option(help="Linear layer that takes low-rank deltas; may be given again (default: those FFNs' last)."),
    ] = None,
    activation: Annotated[
        str, typer.Option(help="Activation of the patch neurons it will take; fixed in the graph.")
    ] = "relu",
    languages: Annotated[str | None, typer.Option(help="Fix the order of language masks: en,de,zh.")] = None,
    every_row: Annotated[
        bool,
        typer.Option("--every-row", help="Let the last layer compute all rows, not only the one a classifier reads."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export a model once, with its patches as optional inputs; checked against the PyTorch model before it is put in place.

    Decoders get a cache of keys and values, encoder-decoders two graphs.

    Example: xpatch export base my-model --out onnx
    """
    from xpatch import exporters
    from xpatch.cli.any_model import load_editable

    check_writable(out)
    order = None if languages is None else [word.strip() for word in languages.split(",") if word.strip()]
    loaded, tokenizer = load_editable(model)
    with quiet_transformers():
        folder = exporters.export_base(
            loaded, out, tokenizer=tokenizer, activation=activation, sites=site or None, linears=linear or None,
            languages=order, head_only=not every_row,
        )  # fmt: skip
    _show(folder, folder, as_json)


@commands.command()
def quantized(
    base: Annotated[Path, typer.Argument(help="Folder that `xpatch export base` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write: the same base in int8.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write an exported base in int8, about a quarter of the bytes; its patches stay in fp32 and are those of the base it is made from.

    Example: xpatch export quantized onnx --out onnx-int8
    """
    from xpatch import exporters

    check_writable(out)
    folder = exporters.quantize_base(base, out)
    _show(folder, folder, as_json)


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
        raise XpatchError(f"--base {base} does not exist; write it with xpatch export base MODEL --out {base}")
    check_out_file(out)
    patch_set = xpatch.load(patches)
    made = exporters.export_adapter(patch_set, base, out)
    _show(made, made, as_json)


@commands.command()
def widened(
    model: Annotated[str, typer.Argument(help="Folder of the Hugging Face model, or 'verifier'.")],
    patches: Annotated[str, typer.Argument(help="Patch folder (or hf:// or another fsspec URL).")],
    out: Annotated[Path, typer.Option(help="Folder to write: config.json, weights, tokenizer.")],
    multiple: Annotated[int, typer.Option(min=1, help="Fill the FFN width up to a multiple of this.")] = 64,
    check: Annotated[bool, typer.Option("--check/--no-check", help=CHECK)] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a plain checkpoint whose FFNs hold the patch neurons: Transformers, vLLM and SGLang load it without xpatch.

    For neurons of the FFN's own activation, in FFNs without gates; the command says so where that is not given.

    Example: xpatch export widened my-model fixes --out my-model-fixed
    """
    from xpatch import exporters

    loaded, tokenizer, patch_set = _inputs(model, patches, out)
    with quiet_transformers():
        folder = exporters.export_widened(loaded, patch_set, out, tokenizer=tokenizer, multiple=multiple, check=check)
    _show(folder, folder, as_json)


@commands.command()
def merged(
    model: Annotated[str, typer.Argument(help="Folder of the Hugging Face model, or 'verifier'.")],
    patches: Annotated[str, typer.Argument(help="Patch folder (or hf:// or another fsspec URL).")],
    out: Annotated[Path, typer.Option(help="Folder to write: config.json, weights, tokenizer.")],
    check: Annotated[bool, typer.Option("--check/--no-check", help=CHECK)] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a plain checkpoint with the deltas of a patch folder added to its weights.

    Example: xpatch export merged my-model fixes --out my-model-fixed
    """
    from xpatch import exporters

    loaded, tokenizer, patch_set = _inputs(model, patches, out)
    with quiet_transformers():
        folder = exporters.export_merged(loaded, patch_set, out, tokenizer=tokenizer, check=check)
    _show(folder, folder, as_json)


@commands.command()
def peft(
    patches: Annotated[str, typer.Argument(help="Patch folder (or hf:// or another fsspec URL).")],
    out: Annotated[Path, typer.Option(help="Folder to write: adapter_config.json, adapter_model.safetensors.")],
    base_model: Annotated[str | None, typer.Option(help="What the adapter names as its base model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the low-rank deltas of a patch folder as a LoRA adapter for PEFT, vLLM and SGLang.

    Example: xpatch export peft fixes --out fixes-lora --base-model my-model
    """
    import xpatch
    from xpatch import exporters

    check_writable(out)
    folder = exporters.export_peft(xpatch.load(patches), out, base_model=base_model)
    _show(folder, folder, as_json)


@commands.command()
def verify(
    base: Annotated[Path, typer.Argument(help="Folder that `xpatch export base` wrote.")],
    model: Annotated[str, typer.Argument(help="Folder of the model it was exported from, or 'verifier'.")],
    patches: Annotated[str, typer.Argument(help="Patch folder (or hf:// or another fsspec URL).")],
    cases: Annotated[
        str | None,
        typer.Option(
            help="JSONL of edit requests whose texts are asked, or 'bundled': the bundled verifier's edit set in every wording; by default "
            "the set's own requests."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 32,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest difference of a logit that is let pass.")] = 1e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare PyTorch and ONNX Runtime with no patch, with one neuron and with all of them, in every language of the cases.

    Exit code 0: every difference is below the tolerance and no prediction differs; 1: something differs; 2: bad input.

    Example: xpatch export verify onnx my-model fixes

    Example: xpatch export verify onnx verifier fixes --cases bundled
    """
    import xpatch
    from xpatch import exporters
    from xpatch.cli.any_model import load_editable
    from xpatch.editors.progress import reporting

    patch_set = xpatch.load(patches)
    asked = read_cases(cases) if cases else [record.request for record in patch_set.edits if record.request is not None]
    texts = exporters.texts_of(asked)
    if not texts:
        raise XpatchError(f"{patches}: its ledger holds no texts to ask; name some with --cases FILE")
    loaded, tokenizer = load_editable(model)
    runs = {"one": exporters.first_rows(patch_set), "all": patch_set}
    with reporting(None) as report:
        found = exporters.verify_sets(
            loaded, tokenizer, base, runs, texts, tolerance=tolerance, batch_size=batch_size, progress=report
        )
    good = all(parity.ok for parity in found.values())
    if as_json:
        print_json({"ok": good, **{name: parity.to_dict() for name, parity in found.items()}})
    else:
        _compared(found, {name: sum(part.count for part in chosen.parts.values()) for name, chosen in runs.items()})
    if not good:
        raise typer.Exit(1)


def _compared(found: Any, counts: Any) -> None:
    from rich.table import Table

    shown = Table(title="PyTorch against ONNX Runtime", title_justify="left", box=None, pad_edge=False)
    for head in ("language", "neurons", "texts", "largest difference", "predictions that differ", "moved by patches"):
        shown.add_column(head, justify="left" if head == "language" else "right")
    for number, parity in enumerate(found["all"].languages):
        shown.add_row(
            parity.language, "0", str(parity.texts), f"{parity.base_max_diff:.1e}", str(parity.base_changed), ""
        )
        for name, count in counts.items():
            one = found[name].languages[number]
            shown.add_row("", str(count), "", f"{one.patched_max_diff:.1e}", str(one.patched_changed), str(one.moved))
    stdout().print(shown)


def _inputs(model: str, patches: str, out: Path) -> tuple[Any, Any, Any]:
    import xpatch
    from xpatch.cli.any_model import load

    check_writable(out)
    patch_set = xpatch.load(patches)
    with quiet_transformers():
        return *load(model), patch_set


def _show(path: Path, file: Path, as_json: bool) -> None:
    size = sum(item.stat().st_size for item in file.iterdir()) if file.is_dir() else file.stat().st_size
    found: dict[str, Any] = {"out": str(path), "bytes": size}
    if as_json:
        print_json(found)
    else:
        stdout().print(f"{path}: {found['bytes'] / 1024:.1f} KiB", markup=False)


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(commands, name="export")
