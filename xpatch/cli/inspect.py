"""`xpatch inspect`: what a patch folder holds, or which FFN sites a model has."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from xpatch.cli.console import print_json, stdout, table
from xpatch.cli.inputs import load_classifier
from xpatch.errors import XpatchError

SHOWN_CHARACTERS = 60


def inspect(
    patches: Annotated[str | None, typer.Argument(help="Patch folder (or hf:// or another fsspec URL).")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder (or 'verifier'): show its FFN sites; with PATCHES, check the fit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a patch folder's ledger, sites, sizes and base identity, or the FFN sites of a model, found by structure.

    Example: xpatch inspect fixes --model my-model
    """
    if patches is None and model is None:
        raise XpatchError("nothing to inspect; give a patch folder, --model DIR, or both")
    import xpatch

    patch_set = xpatch.load(patches) if patches is not None else None
    classifier, tokenizer = load_classifier(model) if model is not None else (None, None)
    found: dict[str, Any] = {}
    if patch_set is not None:
        found["patches"] = describe(patch_set)
    if classifier is not None:
        from xpatch.models.anatomy import find_ffn_sites

        found["model"] = {
            "class": type(classifier).__name__,
            "sites": [_site(site) for site in find_ffn_sites(classifier)],
        }
    if patch_set is not None and classifier is not None:
        from xpatch.patches.identity import check_fit

        check_fit(patch_set, classifier, tokenizer)
        found["fits"] = True
    if as_json:
        print_json(found)
    else:
        _print(found)


def describe(patches: Any) -> dict[str, Any]:
    """A patch set as plain data: name, fingerprint, bytes of its tensors, parts, masks, gates, base and ledger."""
    return {
        "name": patches.name,
        "fingerprint": patches.fingerprint,
        "bytes": sum(part["bytes"] for part in (_part(name, value) for name, value in patches.parts.items())),
        "parts": [_part(name, part) for name, part in patches.parts.items()],
        "masks": {name: list(mask.languages) for name, mask in patches.masks.items()},
        "gates": {name: gate.kind for name, gate in patches.gates.items()},
        "base": patches.base.model_dump() if hasattr(patches.base, "model_dump") else patches.base,
        "edits": [_record(record) for record in patches.edits],
    }


def _part(name: str, part: Any) -> dict[str, Any]:
    tensors = {key: value for key, value in vars(part).items() if hasattr(value, "shape")}
    return {
        "name": name,
        "form": part.form,
        "site": part.site,
        "activation": getattr(part, "activation", None),
        "shapes": {key: list(value.shape) for key, value in tensors.items()},
        "bytes": sum(value.numel() * value.element_size() for value in tensors.values()),
    }


def _record(record: Any) -> dict[str, Any]:
    request = record.request
    return {
        "id": record.id,
        "method": record.method,
        "status": record.status,
        "language": request.language if request is not None else None,
        "languages": sorted(request.versions) if request is not None else [],
        "text": request.versions[request.language].text if request is not None else None,
        "target": request.target_of(request.language) if request is not None else None,
        "rows": {name: len(rows) for name, rows in record.rows.items()},
        "seed": record.seed,
        "created": record.created,
        "message": record.message,
    }


def _site(site: Any) -> dict[str, Any]:
    names = ("layer", "name", "up", "down", "gate", "activation", "width", "inner")
    return {name: getattr(site, name) for name in names}


def _print(found: dict[str, Any]) -> None:
    console = stdout()
    if "patches" in found:
        _print_patches(console, found["patches"])
    if "model" in found:
        names = ("layer", "name", "up", "down", "activation", "width", "inner")
        rows = [[site[name] for name in names] for site in found["model"]["sites"]]
        console.print(table(f"{found['model']['class']}: FFN sites", names, rows))
    if found.get("fits"):
        console.print("The patch set fits this model.")


def _print_patches(console: Any, patches: dict[str, Any]) -> None:
    name = patches["name"] or "patch set"
    size = f"{patches['bytes'] / 1024:.1f} KiB"
    console.print(f"{name}: {len(patches['edits'])} edits, {size}, fingerprint {patches['fingerprint']}", markup=False)
    headings = ("part", "form", "site", "activation", "shapes", "bytes")
    parts = [
        (part["name"], part["form"], part["site"], part["activation"], _shapes(part["shapes"]), part["bytes"])
        for part in patches["parts"]
    ]
    console.print(table("parts", headings, parts))
    console.print(table("base", ("what", "value"), list(_flat(patches["base"] or {}).items())))
    edits = []
    for record in patches["edits"]:
        text = record["text"] or "(redacted)"
        short = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
        rows = ", ".join(f"{name} {count}" for name, count in record["rows"].items())
        values = (
            record["id"],
            record["method"],
            record["status"],
            record["target"],
            " ".join(record["languages"]),
            rows,
            short,
        )
        edits.append(values)
    console.print(table("edits", ("id", "method", "status", "target", "languages", "rows", "text"), edits))


def _shapes(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    if not isinstance(data, dict):
        return {prefix: data} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(inspect)
