"""`xpatch bench crosslingual`: every method on the bundled verifier's claims, in the form of MPN's tables and XME's matrices.

`xpatch bench swap`: patches in production: swap against reload, a soak of many threads, crashes, damaged files, start-up.

`xpatch bench editing`: edits a second against the published procedure written plainly, and thousands of edits in one run.

`xpatch bench kernel`: the patch kernel against dense PyTorch and against memory. `xpatch bench latency`: whole patched models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.console import stdout
from xpatch.cli.inputs import check_method, check_out_file, model_folder, needs, quiet_transformers
from xpatch.errors import XpatchError

BACKENDS = ("torch", "ort", "both")
commands = typer.Typer(help="Measure editors and the runtime.", no_args_is_help=True, rich_markup_mode="rich")


@commands.callback()
def bench() -> None:
    """Measure editors and the runtime."""


@commands.command()
def crosslingual(
    json_file: Annotated[
        Path, typer.Option("--json", help="Result file; finished runs are kept beside it and reused.")
    ],
    parts: Annotated[
        str, typer.Option(help="table, all-wrong, zero-shot, matrix; comma separated (default: all).")
    ] = "table,all-wrong,zero-shot,matrix",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few edits and one seed, for a first look; sizes given count.")
    ] = False,
    edits: Annotated[
        int | None, typer.Option(min=1, help="At most so many claims in the edit sets (default: all).")
    ] = None,
    locality: Annotated[
        int | None, typer.Option(min=1, help="At most so many locality claims of each kind and language.")
    ] = None,
    matrix_edits: Annotated[
        int | None, typer.Option(min=1, help="Edits of the matrix in each language (default: 100).")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, comma separated (default: 0,1,2).")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Only these methods, comma separated; 'original' is the unpatched model.")
    ] = None,
    presets: Annotated[str | None, typer.Option(help="Only these presets, comma separated.")] = None,
    editors: Annotated[
        Path | None, typer.Option(help="Trained editors, one a folder (default: hyper_editors.work beside the file).")
    ] = None,
    bases: Annotated[
        Path | None, typer.Option(help="Fine-tuned bases; missing ones are made (default: in the work folder).")
    ] = None,
) -> None:
    """Train and measure every method with every preset and seed: the tables of MPN and the matrices of XME on the bundled verifier.

    Each part is a file of its own beside the first. Finished rows are kept, so an interrupted run goes on where it stopped.

    Example: xpatch bench crosslingual --quick --parts table --json crosslingual.json
    """
    chosen = None if methods is None else _words("--methods", methods)
    for method in chosen or ():
        if method != "original":
            check_method(method)
    numbers = None if seeds is None else _seeds(seeds)
    check_out_file(json_file, "--json")
    from xpatch.benchmarks import report, tables

    with quiet_transformers():
        results = tables.run(
            json_file,
            parts=_words("--parts", parts),
            quick=quick,
            edits=edits,
            locality=locality,
            matrix_edits=matrix_edits,
            seeds=numbers,
            methods=chosen,
            presets=None if presets is None else _words("--presets", presets),
            editors=editors,
            bases_folder=bases,
            tell=lambda line: stdout().print(line, markup=False, highlight=False),
        )
    for result in results.values():
        for shown in report.tables(result):
            stdout().print(shown)


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


@commands.command()
def kernel(
    json_file: Annotated[
        Path, typer.Option("--json", help="Result file; finished rows are kept beside it and reused.")
    ],
    quick: Annotated[bool, typer.Option("--quick", help="A small grid, in under a minute.")] = False,
    stretch: Annotated[
        bool, typer.Option("--stretch", help="From 1 000 to a million patches, with a chart beside the file.")
    ] = False,
    n: Annotated[str | None, typer.Option("--n", help="Numbers of patches, comma separated.")] = None,
    m: Annotated[str | None, typer.Option("--m", help="Rows a call, comma separated.")] = None,
    patches: Annotated[
        str | None, typer.Option(help="default, paper, outlier, adversarial; comma separated (default: all).")
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Threads, comma separated (default: PyTorch's own number).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the patches.")] = 0,
) -> None:
    """Time the patch kernel against dense PyTorch and a plain read of its keys, on patches that were really trained.

    Example: xpatch bench kernel --quick --json kernel.json
    """
    if quick and stretch:
        raise XpatchError("--quick and --stretch are two grids; give one of them")
    chosen = {"n": _numbers("--n", n), "m": _numbers("--m", m), "threads": _numbers("--threads", threads)}
    kinds = [] if patches is None else _words("--patches", patches)
    check_out_file(json_file, "--json")
    from xpatch.benchmarks import kernel as benchmark

    unknown = sorted(set(kinds).difference(benchmark.KINDS))
    if unknown:
        raise XpatchError(f"--patches: no kind {', '.join(unknown)}; kinds are {', '.join(benchmark.KINDS)}")
    with quiet_transformers():
        result = benchmark.run(json_file, quick=quick, stretch=stretch, patches=kinds, seed=seed, **chosen)
    stdout().print(benchmark.table(result))
    stdout().print(f"{json_file}", markup=False)


@commands.command()
def latency(
    json_file: Annotated[
        Path, typer.Option("--json", help="Result file; finished rows are kept beside it and reused.")
    ],
    model: Annotated[
        str,
        typer.Option(help="bert-base, xlmr-base, gpt2, llama-1b (random weights) or a model folder; comma separated."),
    ] = "bert-base",
    patches: Annotated[int | None, typer.Option(min=1, help="Patches (default: 4598, decoders 1000).")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, comma separated.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens a text, or in a decoder's cache before its step; comma separated.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="What runs the model: torch, ort (classifiers in ONNX Runtime), or both.")
    ] = "torch",
    quick: Annotated[bool, typer.Option("--quick", help="Short texts and small batches, in under a minute.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, inputs and patches.")] = 0,
) -> None:
    """Time whole models: unpatched, with xpatch.optimize alone, patched, and with the patches as two dense matmuls; or in ONNX Runtime,
    patched and not. With --backend both, the second result is written beside the first, with _ort in its name.

    Example: xpatch bench latency --model bert-base --quick --json latency.json
    """
    if backend not in BACKENDS:
        raise XpatchError(f"--backend: no backend {backend!r}; backends are {', '.join(BACKENDS)}")
    chosen = {"batches": _numbers("--batch", batch), "tokens": _numbers("--tokens", tokens)}
    names = _words("--model", model)
    check_out_file(json_file, "--json")
    from xpatch.benchmarks import model_latency, ort_latency

    if backend != "torch":
        needs("--backend ort", "onnxruntime", "onnx")
    beside = json_file.with_name(f"{json_file.stem}_ort{json_file.suffix}") if backend == "both" else json_file
    with quiet_transformers():
        models = [_subject(name) for name in names]
        for name, benchmark, path in (("torch", model_latency, json_file), ("ort", ort_latency, beside)):
            if backend in (name, "both"):
                result = benchmark.run(path, models=models, patches=patches, quick=quick, seed=seed, **chosen)
                stdout().print(benchmark.table(result))
                stdout().print(f"{path}", markup=False)


@commands.command()
def editing(
    json_file: Annotated[
        Path, typer.Option("--json", help="Result file; finished parts are kept beside it and reused.")
    ],
    bases: Annotated[
        str, typer.Option(help="verifier, bert-base (random weights); comma separated.")
    ] = "verifier,bert-base",
    procedures: Annotated[str, typer.Option(help="plain, cached, chunked; comma separated.")] = "plain,cached,chunked",
    edits: Annotated[
        int | None, typer.Option(min=1, help="Edits of every procedure (default: few plain ones, more of the others).")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of an edit (default: the preset's).")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, comma separated.")] = "0,1,2",
    scale: Annotated[
        bool, typer.Option("--scale", help="Instead: up to 10 000 edits in one call, with charts beside the file.")
    ] = False,
    counts: Annotated[str | None, typer.Option(help="With --scale: numbers of edits, comma separated.")] = None,
) -> None:
    """Time editing against the published procedure written plainly: one edit at a time, the whole model at every step.

    Example: xpatch bench editing --bases verifier --edits 4 --steps 50 --seeds 0 --json editing.json
    """
    names, chosen = _words("--bases", bases), _words("--procedures", procedures)
    numbers, sizes = _seeds(seeds), _numbers("--counts", counts)
    if sizes and not scale:
        raise XpatchError("--counts goes with --scale")
    check_out_file(json_file, "--json")
    if scale:
        _scale(json_file, sizes, numbers[0], {} if steps is None else {"steps": steps})
        return
    from xpatch.benchmarks import editing as benchmark
    from xpatch.benchmarks import editing_rows

    for option, words, known in (
        ("--bases", names, tuple(benchmark.SIZES)),
        ("--procedures", chosen, benchmark.PROCEDURES),
    ):
        if unknown := sorted(set(words).difference(known)):
            raise XpatchError(f"{option}: there is no {', '.join(unknown)}; choose from {', '.join(known)}")
    with quiet_transformers():
        result = benchmark.run(
            json_file,
            bases=names,
            procedures=chosen,
            edits=None if edits is None else dict.fromkeys(chosen, edits),
            steps_each=steps,
            seeds=numbers,
        )
    stdout().print(editing_rows.table(result))
    stdout().print(f"{json_file}", markup=False)


def _scale(json_file: Path, counts: list[int], seed: int, overrides: dict[str, Any]) -> None:
    from xpatch.benchmarks import editing_scale as benchmark

    with quiet_transformers():
        result = benchmark.run(json_file, counts=counts or benchmark.COUNTS, seed=seed, **overrides)
    stdout().print(benchmark.table(result))
    stdout().print(f"{json_file}", markup=False)


def _subject(name: str) -> Any:
    """A named shape, or the model of a folder: a classifier, or a decoder whose steps are timed."""
    from xpatch.benchmarks import model_shapes
    from xpatch.cli import any_model
    from xpatch.models import anatomy

    if name in model_shapes.NAMES and not Path(name).exists():
        return model_shapes.subject(name)
    made, _ = any_model.load(name)
    kind = type(made).__name__
    decoder = kind.endswith(("ForCausalLM", "LMHeadModel"))
    if not decoder and not kind.endswith("ForSequenceClassification"):
        raise XpatchError(
            f"--model {name}: expected a sequence classifier or a causal language model, found {kind}; named shapes are "
            f"{', '.join(model_shapes.NAMES)}"
        )
    site = anatomy.final_ffn(made)
    return model_shapes.folder_subject(name, model_folder(name), made, (site.name, site.up, site.down), decoder)


def _numbers(option: str, text: str | None) -> list[int]:
    """Whole numbers from 1 on; none where the option was not given."""
    if text is None:
        return []
    words = _words(option, text)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise XpatchError(f"{option}: expected whole numbers such as 1,8,32; found {text!r}")
    return [int(word) for word in words]


def _seeds(text: str) -> list[int]:
    words = _words("--seeds", text)
    if not all(word.isdecimal() for word in words):
        raise XpatchError(f"--seeds: expected whole numbers such as 0,1,2; found {text!r}")
    return [int(word) for word in words]


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise XpatchError(f"{option}: expected at least one, found {text!r}")
    return words


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(commands, name="bench")
