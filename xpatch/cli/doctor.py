"""`xpatch doctor`: versions, the native build, instruction set, CUDA, ONNX Runtime, threads."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from xpatch.cli.console import print_json, stdout, table

SIGNS = {"ok": Text("✓", style="green"), "optional": Text("–"), "problem": Text("✗", style="red")}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Show what is installed and built, and what is wrong with it. Exit code 1 when something xpatch needs is missing.

    Example: xpatch doctor --json
    """
    from xpatch.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
    else:
        rows = [(SIGNS[check["state"]], check["name"], check["found"], check["hint"]) for check in found["checks"]]
        cpu = found["cpu"]
        rows.append((Text(), "CPU", f"{cpu['model']}, {cpu['cores']} cores", " ".join(cpu["flags"])))
        rows.append((Text(), "threads", ", ".join(f"{name} {count}" for name, count in found["threads"].items()), ""))
        stdout().print(table("", ("", "what", "found", "next step"), rows))
    raise typer.Exit(0 if found["ok"] else 1)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)
