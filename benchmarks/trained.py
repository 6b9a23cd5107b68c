"""The patches every kernel benchmark is timed on: neurons trained by the project's own editor, on rows they were not trained on.

    python -m xpatch.benchmarks.trained --width 768 --neurons 5000 --rows 1024      # make them, and say what they are

`cases` gives one case: `TRAINED` neurons really trained by `mpn`, resampled ones beyond (trained_scale.py), and rows x of held-out
sentences. What was trained is kept in `benchmarks/results/trained.work`; an interrupted run goes on where it stopped.
Seed 0 is for what is reported, seed 1 for what is tuned: other claims and other held-out subjects.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from xpatch import XpatchError

from . import texts, trained_base, trained_neurons, trained_scale
from .progress import steps
from .trained_base import Base, write
from .trained_neurons import FOLDER

Kind = Literal["default", "paper", "outlier", "adversarial"]
Positions = Literal["read", "tokens"]
KINDS: Sequence[Kind] = ("default", "paper", "outlier", "adversarial")
TRAINED = 5000  # neurons really trained; more are resampled


@dataclass(frozen=True)
class Case:
    """Neurons and rows to time them on: keys `[N, D]`, bias `[N]`, values `[N, D]`, x `[M, D]`, and y `[M, D]`, what the FFN itself
    gives for x. memory `[M', D]` fp32: rows of the memory's claims, which keys may be packed for. histogram: pre-activations of the trained neurons and of these (`trained_scale.histogram`); info: how they were made.
    """

    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    memory: torch.Tensor
    activation: str
    histogram: Mapping[str, Any]
    source: str
    info: Mapping[str, Any]


def cases(
    kind: str, neurons: int, rows: int, width: int = 768, *, dtype: torch.dtype = torch.float32, seed: int = 0,
    positions: str = "read", source: str | None = None, base: Base | None = None, folder: Path | None = FOLDER,
    trained: int = TRAINED, progress: bool | None = None, settings: Mapping[str, Any] | None = None,
) -> Case:  # fmt: skip
    """`neurons` patch neurons and `rows` rows of width `width`. Equal arguments give equal tensors on one machine.

    kind: "default" (ReLU) and "paper" (the FFN's GELU) as `mpn` trains them with these presets; "outlier": the default's, with outlier
    coordinates; "adversarial": the default's, every neuron firing on every row.
    positions: "read", the rows a classifier's head reads, one a sentence; "tokens", the rows of all tokens.
    source: see `trained_base.SOURCES`; by default the width's own. base: a classifier of the caller's instead.
    folder: where trained neurons are kept; None keeps nothing. trained: at least so many are really trained, where so many are asked
    for. settings: of `trained_neurons.gather`, for tests.

    Raises `XpatchError` for a kind, width or source there is not.
    """
    if kind not in KINDS:
        raise XpatchError(f"no kind {kind!r} of case; kinds: {', '.join(KINDS)}")
    settings = settings or {}
    preset = "paper" if kind == "paper" else "default"
    with steps(progress, 4) as bar:
        bar.begin("classifier")
        base = base or trained_base.base(_source(width, source), report=bar.report, folder=folder)
        bar.end()
        bar.begin(f"{preset} neurons")
        found = trained_neurons.gather(
            base, preset, min(neurons, trained), seed, folder=folder, report=bar.report, **settings
        )
        bar.end()
        bar.begin("rows")
        held = _rows(base, texts.held_out(rows, seed, base.languages), positions, rows, folder)
        bar.end()
        bar.begin("resampling")
        keys, bias, values = found.keys[:neurons], found.bias[:neurons], found.values[:neurons]
        memory = memory_rows(base, folder)
        if neurons > len(bias):
            generator = torch.Generator().manual_seed(seed)
            keys, bias, values = trained_scale.resample((keys, bias, values), memory, neurons, generator, dtype)
        bar.end()
    several = len(keys) > len(found.bias)  # else the case is some of the trained ones, and the same ones are compared
    own = (found.keys, found.bias) if several else (keys, bias)
    before = trained_scale.scores(*own, held["x"])
    x = held["x"]
    generator = torch.Generator().manual_seed(seed)
    if kind == "outlier":
        keys, bias, x, memory = trained_scale.outliers(keys, bias, x, generator, memory)
    elif kind == "adversarial":
        bias = trained_scale.adversarial(keys, bias, x)
    after = trained_scale.scores(keys, bias, x)
    return Case(
        keys=keys.to(dtype),
        bias=bias.to(dtype),
        values=values.to(dtype),
        x=x.to(dtype),
        y=held["y"].to(dtype),
        memory=memory,
        activation=found.activation,
        histogram=trained_scale.histogram(before, after, found.activation),
        source=base.note.get("source", "given"),
        info={
            "kind": kind,
            "positions": positions,
            "seed": seed,
            "base": dict(base.note),
            **found.info,
            "trained": len(found.bias),
        },
    )


def _source(width: int, source: str | None) -> str:
    if source is None:
        if width not in trained_base.DEFAULT:
            widths = ", ".join(map(str, trained_base.DEFAULT))
            raise XpatchError(f"no classifier of width {width}; widths: {widths}; or pass a Base of your own")
        return trained_base.DEFAULT[width]
    if trained_base.SOURCES.get(source) != width:
        raise XpatchError(f"source {source!r} has not the width {width}; sources and widths: {trained_base.SOURCES}")
    return source


def memory_rows(base: Base, folder: Path | None = FOLDER, count: int = 2000) -> torch.Tensor:
    """Rows `[M, D]` the head reads of `count` claims of the memory, as many in each language: what neurons were trained not to fire on."""
    memory = texts.memory(base.languages, -(-count // len(base.languages)))
    sentences = [text for row in zip(*memory.values(), strict=True) for text in row][:count]
    return _rows(base, sentences, "read", len(sentences), folder)["x"]


def _rows(
    base: Base, sentences: Sequence[str], positions: str, count: int, folder: Path | None
) -> dict[str, torch.Tensor]:
    """x and y of `count` rows of `sentences`, kept in `folder`."""
    name = f"rows-{trained_neurons.key(base, [positions, count, list(sentences)])}.safetensors"
    path = None if folder is None else folder / name
    if path is not None and path.is_file():
        return load_file(path)
    found = trained_neurons.rows(base, sentences, positions, count)
    if path is not None:
        write(path, found, {})
    return found


def describe(case: Case) -> str:
    """One case in a few lines: what it is, the pre-activations before and after, and what fires."""
    found = case.histogram
    lines = [
        f"{case.source}, {case.info['kind']}: {len(case.bias)} neurons ({case.info['trained']} trained), {len(case.x)} rows, "
        f"D = {case.x.shape[1]}, {case.activation}; claims: {case.info['claims']}",
        f"above {found['cut']}: {100 * found['fires_before']:.4f} % of pairs as trained, {100 * found['fires_after']:.4f} % here; "
        f"histograms differ by {found['distance']:.4f}",
        "pre-activation  as trained      here",
    ]
    edges, old, new = found["edges"], found["before"][1:-1], found["after"][1:-1]
    for start in range(0, len(old), 8):
        lines.append(
            f"{edges[start]:8.2f} ...  {100 * sum(old[start : start + 8]):9.4f} % {100 * sum(new[start : start + 8]):9.4f} %"
        )
    outside = found["before"][0] + found["before"][-1], found["after"][0] + found["after"][-1]
    lines.append(f"outside       {100 * outside[0]:9.4f} % {100 * outside[1]:9.4f} %")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m xpatch.benchmarks.trained", description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--source", choices=sorted(trained_base.SOURCES))
    parser.add_argument("--neurons", type=int, default=TRAINED)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--positions", choices=("read", "tokens"), default="read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where trained neurons are kept")
    found = parser.parse_args(argv)
    for kind in found.kind:
        print(
            describe(
                cases(
                    kind, found.neurons, found.rows, found.width, seed=found.seed, positions=found.positions, source=found.source,
                    folder=found.folder,
                )
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
