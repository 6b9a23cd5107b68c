"""`xpatch bench crosslingual`: every method on the bundled verifier's edit set, with MPN's Table 1 beside it.

`xpatch bench swap`: patches in production: swap against reload, a soak of many threads, crashes, damaged files, start-up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xpatch.cli.console import stdout
from xpatch.cli.inputs import check_method, check_out_file, quiet_transformers
from xpatch.errors import XpatchError

commands = typer.Typer(help="Measure editors and the runtime.", no_args_is_help=True, rich_markup_mode="rich")


@commands.callback()
def bench() -> None:
    """Measure editors and the runtime."""


@commands.command()
def crosslingual(
    json_file: Annotated[
        Path, typer.Option("--json", help="Result file; finished runs are kept beside it and reused.")
    ],
    edits: Annotated[
        int | None, typer.Option(min=1, help="At most so many claims in the edit set (default: all).")
    ] = None,
    locality: Annotated[
        int | None, typer.Option(min=1, help="At most so many locality claims of each kind and language.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, comma separated.")] = "0,1,2",
    methods: Annotated[str, typer.Option(help="Methods, comma separated.")] = "original,ft,t-patcher,mpn-only,mpn",
    presets: Annotated[str, typer.Option(help="Presets, comma separated.")] = "paper,default",
) -> None:
    """Train and measure every method with every preset and seed: Table 1 of the MPN paper on the bundled verifier.

    Example: xpatch bench crosslingual --edits 100 --locality 200 --seeds 0 --json crosslingual.json
    """
    chosen = _words("--methods", methods)
    for method in chosen:
        if method != "original":
            check_method(method)
    numbers = _words("--seeds", seeds)
    if not all(word.isdecimal() for word in numbers):
        raise XpatchError(f"--seeds: expected whole numbers such as 0,1,2; found {seeds!r}")
    check_out_file(json_file, "--json")
    from xpatch.benchmarks import crosslingual as benchmark
    from xpatch.benchmarks import report

    with quiet_transformers():
        result = benchmark.run(
            json_file,
            edits=edits,
            locality=locality,
            seeds=[int(word) for word in numbers],
            methods=chosen,
            presets=_words("--presets", presets),
        )
    stdout().print(report.table(result))
    stdout().print(f"{json_file}", markup=False)


@commands.command()
def swap(
    json_file: Annotated[
        Path, typer.Option("--json", help="Result file; finished parts are kept beside it and reused.")
    ],
    soak_swaps: Annotated[int, typer.Option(min=4, help="Applies and removes while 8 threads infer.")] = 10_000,
    crash_writes: Annotated[int, typer.Option(min=1, help="Writes of a patch store that are killed.")] = 500,
    fuzz_files: Annotated[int, typer.Option(min=1, help="Damaged patch folders to read.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of models, patches and order.")] = 0,
) -> None:
    """Measure a swap of 1000 patches against a reload, and soak the runtime: torn outputs, crashes, leaks.

    Example: xpatch bench swap --soak-swaps 500 --crash-writes 20 --fuzz-files 1000 --json swap.json
    """
    check_out_file(json_file, "--json")
    from xpatch.benchmarks import swap as benchmark

    with quiet_transformers():
        result = benchmark.run(
            json_file, soak_swaps=soak_swaps, crash_writes=crash_writes, fuzz_files=fuzz_files, seed=seed
        )
    stdout().print(benchmark.table(result))
    stdout().print(f"{json_file}", markup=False)


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise XpatchError(f"{option}: expected at least one, found {text!r}")
    return words


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(commands, name="bench")
