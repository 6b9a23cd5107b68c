"""`xpatch inspect`: what a patch folder holds, or where patches can stand in a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from xpatch.cli.console import print_json, stdout, table, warn
from xpatch.errors import MismatchError, XpatchError

SHOWN_CHARACTERS = 60
BELOW = ("up", "down", "gate")


def inspect(
    patches: Annotated[str | None, typer.Argument(help="Patch folder (or hf:// or another fsspec URL).")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder (or 'verifier'): show its FFN sites without loading weights; with PATCHES, check the fit."
        ),
    ] = None,
    linears: Annotated[
        bool, typer.Option("--linears", help="With --model: also list the linear layers deltas can stand beside.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a patch folder's ledger, sites, sizes and base identity, or where patches can stand in a model of any kind.

    Example: xpatch inspect fixes --model my-model

    Example: xpatch inspect --model my-model --linears
    """
    if patches is None and model is None:
        raise XpatchError("nothing to inspect; give a patch folder, --model DIR, or both")
    if linears and model is None:
        raise XpatchError("--linears lists a model's layers; give --model DIR too")
    import xpatch

    patch_set = xpatch.load(patches) if patches is not None else None
    found: dict[str, Any] = {}
    if patch_set is not None:
        found["patches"] = describe(patch_set)
    if model is not None:
        from xpatch.cli import any_model

        found["model"] = describe_model(any_model.skeleton(model), linears=linears)
        if patch_set is not None:
            loaded, tokenizer = any_model.load(model)
            xpatch.apply(loaded, patch_set, tokenizer=tokenizer)
            found["fits"] = True
    if as_json:
        print_json(found)
    else:
        _print(found)


def describe_model(model: Any, *, linears: bool) -> dict[str, Any]:
    """A model as plain data: its class, parameters, FFN sites, and with `linears` the linear layers. Needs no weights.

    Raises `MismatchError` saying what was found where there is no FFN; with `linears` that is a warning.
    """
    from xpatch.models import anatomy

    try:
        sites = anatomy.find_ffn_sites(model)
    except MismatchError as error:
        if not linears:
            raise
        warn(str(error))
        sites = []
    quantisation = getattr(getattr(model, "config", None), "quantization_config", None)
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "quantised": _method(quantisation) if quantisation is not None else None,
        "sites": [_site(site) for site in sites],
    }
    if linears:
        roles = {getattr(site, role): f"{role} of {site.name}" for site in sites for role in BELOW if not site.experts}
        found["linears"] = [
            {"name": item.name, "inside": item.inside, "outside": item.outside, "role": roles.get(item.name)}
            for item in anatomy.linears(model)
        ]
    return found


def describe(patches: Any) -> dict[str, Any]:
    """A patch set as plain data: name, fingerprint, bytes of its tensors, parts, masks, gates, base and ledger."""
    return {
        "name": patches.name,
        "fingerprint": patches.fingerprint,
        "signatures": [each.key_id for each in patches.signatures],
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
        "expires": request.expires if request is not None else None,
        "message": record.message,
    }


def _site(site: Any) -> dict[str, Any]:
    return {**vars(site), "kind": site.kind}


def _method(quantisation: Any) -> str:
    """The name of a method of quantisation, from its entry in a configuration (a mapping or an object)."""
    method = (
        quantisation.get("quant_method")
        if isinstance(quantisation, dict)
        else getattr(quantisation, "quant_method", None)
    )
    return str(getattr(method, "value", method) or "unknown")


def _print(found: dict[str, Any]) -> None:
    console = stdout()
    if "patches" in found:
        _print_patches(console, found["patches"])
    if "model" in found:
        _print_model(console, found["model"])
    if found.get("fits"):
        console.print("The patch set fits this model.")


def _print_model(console: Any, model: dict[str, Any]) -> None:
    quantised = f", quantised ({model['quantised']})" if model["quantised"] else ""
    console.print(f"{model['class']}: {model['parameters']:,} parameters{quantised}", markup=False)
    rows: list[tuple[Any, ...]] = []
    for site in model["sites"]:
        name, experts = site["name"], site["experts"]
        kind = f"{experts} experts" if experts else site["kind"]
        uses = f", used {site['uses']} times" if site["uses"] > 1 else ""
        below = [_below(name, site[role]) for role in BELOW]
        sizes = (site["activation"], site["width"], site["inner"] or None)
        rows.append((site["layer"], name, site["stack"], kind + uses, *below, *sizes, site["family"]))
    columns = ["layer", "site", "stack", "kind", *BELOW, "activation", "width", "inner", "family"]
    if not any(site["family"] for site in model["sites"]):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    if rows:
        console.print(table("FFN sites (up, down and gate below the site's name)", columns, rows))
    if "linears" in model:
        names = ("name", "inside", "outside", "role")
        console.print(table("linear layers", names, [[item[name] for name in names] for item in model["linears"]]))


def _below(site: str, name: str | None) -> str | None:
    """A linear's name without its site's; None for the site itself (a mixture of experts is patched as a whole)."""
    return None if name is None or name == site else name.removeprefix(f"{site}.")


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
