"""The patch kernel against dense PyTorch and against memory: `xpatch.ops.patch_ffn` on patches trained by the project's own editors.

    xpatch bench kernel --json results/kernel.json
    xpatch bench kernel --stretch --json results/kernel_stretch.json

Axes: M rows, D width, N neurons. Finished rows are kept beside the result file and reused when nothing that decides them has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xpatch import ops
from xpatch.ops import native

from . import goals as judged
from . import kernel_point, machine, parts
from .charts import cost_chart
from .latency import measure
from .progress import steps

if TYPE_CHECKING:
    from rich.console import Group

NEURONS, ROWS, WIDTH = (1_000, 5_000, 50_000), (1, 8, 32, 256, 1024), 768
KINDS = ("default", "paper", "outlier", "adversarial")
STRETCH_NEURONS, STRETCH_ROWS = (1_000, 3_162, 10_000, 31_623, 100_000, 316_228, 1_000_000), (1, 8)
QUICK_NEURONS, QUICK_ROWS = (1_000, 5_000), (1, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACK_REPEATS_UP_TO = 100_000  # neurons; packing more is timed once
CODE = ("kernel", "latency", "trained", "texts")
Cases = Callable[..., Any]


@dataclass(frozen=True)
class Cell:
    """What decides one row: which patches, how many, in which dtype, on which rows of the model, threads, rows a call."""

    patches: str
    n: int
    dtype: str
    rows: str
    threads: int
    m: int


def run(
    out: str | Path | None = None,
    *,
    n: Sequence[int] = (),
    m: Sequence[int] = (),
    patches: Sequence[str] = (),
    threads: Sequence[int] = (),
    quick: bool = False,
    stretch: bool = False,
    width: int = WIDTH,
    seed: int = 0,
    repeats: int | None = None,
    cases: Cases | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure the grid and return the result as JSON values, written to `out` when it is given; with `stretch` a chart beside it.

    n, m, patches, threads: instead of the grid's own values (threads: torch's). quick: a small grid; stretch: N from 1 000 to a
    million. repeats: of every side, at least 15; None: as many as the time allows. cases: the generator of patches, by default
    `xpatch.benchmarks.trained.cases`. work: folder for finished rows, by default beside `out`; without `out` nothing is kept.
    progress: a bar; None: on a terminal only.
    """
    cells = grid(n, m, patches, threads or (torch.get_num_threads(),), quick, stretch)
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    shelf = _Shelf(cases, width, max((cell.m for cell in cells), default=1), seed)
    fixed = {"d": width, "seed": seed, "repeats": repeats, "build": machine.native_build(), "held_rows": shelf.rows}
    rows: list[dict[str, Any]] = []
    facts: dict[str, dict[str, Any]] = {}
    with steps(progress, len(cells)) as bar:
        for cell in cells:
            bar.begin(f"{cell.patches} {cell.dtype}, N={cell.n}, M={cell.m}")
            with _threads(cell.threads):
                about = {**fixed, "patches": cell.patches, "n": cell.n, "dtype": cell.dtype, "rows": cell.rows}
                name = f"{cell.patches}-{cell.rows}-{cell.dtype}-{cell.n}"
                if name not in facts:
                    facts[name] = parts.kept(folder, f"case-{name}", about, functools.partial(shelf.facts, cell), CODE)
                settings = {**fixed, **asdict(cell)}
                make = functools.partial(_row, cell, shelf, repeats)
                rows.append(parts.kept(folder, f"{name}-{cell.m}-{cell.threads}", settings, make, CODE))
            bar.end()
    result: dict[str, Any] = {
        "benchmark": "kernel-stretch" if stretch else "kernel",
        "unit": "ms",
        "header": machine.header([seed], command),
        "isa": native.info().get("isa"),
        "cases": list(facts.values()),
        "rows": rows,
    }
    result["goals"] = goals(result)
    if out is not None:
        machine.write_json(result, Path(out))
        if stretch:
            machine.write_text(cost_chart(result), Path(out).with_suffix(".svg"))
    return result


def grid(
    n: Sequence[int], m: Sequence[int], patches: Sequence[str], threads: Sequence[int], quick: bool, stretch: bool
) -> list[Cell]:
    """The rows to measure, those of one set of patches together. Values that are given replace the grid's own."""
    if stretch:
        n, m, patches = n or STRETCH_NEURONS, m or STRETCH_ROWS, patches or ("default",)
    elif quick:
        n, m, patches = n or QUICK_NEURONS, m or QUICK_ROWS, patches or ("default", "paper")
    cells = []
    for kind in patches or KINDS:
        sizes = n or (NEURONS if kind in ("default", "paper") else (5_000,))
        cells += [
            Cell(kind, size, "fp32", "read", thread, rows) for size in sizes for thread in threads for rows in m or ROWS
        ]
    if not (n or m or patches):
        cells += [Cell("default", 5_000, "fp32", "tokens", thread, rows) for thread in threads for rows in (32, 256)]
        cells += [Cell("default", 5_000, "bf16", "read", thread, rows) for thread in threads for rows in (1, 32)]
    return cells


class _Shelf:
    """The patches in hand: cells come sorted, so one set is held at a time (a million neurons are 7 GB)."""

    def __init__(self, cases: Cases | None, width: int, rows: int, seed: int) -> None:
        self._cases, self._width, self._seed = cases, width, seed
        self.rows = max(rows, kernel_point.TIMED_ROWS)
        self._held: tuple[tuple[str, int, str, str], Any, kernel_point.Loaded] | None = None

    def take(self, cell: Cell) -> tuple[Any, kernel_point.Loaded]:
        """The generator's case and its patches in the cell's dtype."""
        key = (cell.patches, cell.n, cell.rows, cell.dtype)
        if self._held is None or self._held[0] != key:
            self._held = None
            make: Callable[..., Any] | None = self._cases
            if make is None:
                from . import trained

                make = trained.cases
            about: dict[str, Any] = {"width": self._width, "seed": self._seed, "positions": cell.rows}
            case = make(cell.patches, neurons=cell.n, rows=self.rows, progress=False, **about)
            self._held = (key, case, kernel_point.load(case, DTYPES[cell.dtype]))
        return self._held[1], self._held[2]

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What is measured once a set: packing, the histogram of its pre-activations, where it comes from."""
        case, loaded = self.take(cell)
        made = {"patches": cell.patches, "n": cell.n, "d": self._width, "dtype": cell.dtype, "rows": cell.rows}
        packing: dict[str, Any] = {"pack_ms": None, "packed_bytes": None}
        if loaded.packed is not None:
            packing = {**_pack_ms(loaded), "packed_bytes": loaded.packed.numel()}
        told = {"source": case.source, "info": dict(case.info), "histogram": dict(case.histogram)}
        return {**made, "activation": case.activation, **packing, **told}


def _pack_ms(loaded: kernel_point.Loaded) -> dict[str, Any]:
    call = functools.partial(ops.pack_keys, loaded.keys, loaded.bias, loaded.activation, loaded.memory)
    if loaded.keys.shape[0] <= PACK_REPEATS_UP_TO:
        found = measure({"pack": call}, 15, warmup=1)["pack"]
        return {"pack_ms": found["p50_ms"], "pack_iqr_ms": found["iqr_ms"]}
    return {"pack_ms": kernel_point.once_ms(call), "pack_iqr_ms": None}


def _row(cell: Cell, shelf: _Shelf, repeats: int | None) -> dict[str, Any]:
    _, loaded = shelf.take(cell)
    width = loaded.keys.shape[1]
    found = kernel_point.point(loaded, cell.m, repeats)
    peak = None
    if cell.m >= 256:
        peak = kernel_point.int8_peak_share(cell.m * cell.n * width, found["kernel_ms"], cell.threads)
    return {
        "n": cell.n,
        "m": cell.m,
        "d": width,
        "dtype": cell.dtype,
        "threads": cell.threads,
        "isa": native.info().get("isa"),
        "patches": cell.patches,
        "rows": cell.rows,
        **found,
        "int8_peak_share": peak,
    }


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the kernel set out to reach, and what it reached at the worst point; only of the points that were measured."""
    rows = [row for row in result["rows"] if row["dtype"] == "fp32" and row["rows"] == "read"]
    large_enough = [row for row in rows if row["n"] >= 1_000]  # where the goals begin
    where = ("n", "m")

    def of(kind: str, **bounds: tuple[int, int]) -> Iterator[Mapping[str, Any]]:
        for row in large_enough:
            if row["patches"] == kind and all(low <= row[axis] <= high for axis, (low, high) in bounds.items()):
                yield row

    most = 10**9
    if result["benchmark"] == "kernel-stretch":
        million = of("default", n=(1_000_000, most), m=(1, 1))
        return judged.worst(
            "a million neurons, one row, over a read of their keys", million, "floor_ratio", where, at_most=0.35
        )
    adversarial = [{**row, "cost": round(row["kernel_ms"] / row["dense_ms"], 4)} for row in of("adversarial")]
    large, few, many = (5_000, most), (1, 32), (33, most)
    return [
        *judged.worst("default patches, N >= 5 000, M <= 32: times dense", of("default", n=large, m=few), "speedup", where, at_least=10),
        *judged.worst("default patches, N >= 5 000, M > 32: times dense", of("default", n=large, m=many), "speedup", where, at_least=8),
        *judged.worst("default patches, 1 000 <= N < 5 000: times dense", of("default", n=(1_000, 4_999)), "speedup", where, at_least=5),
        *judged.worst("paper patches: times dense", of("paper"), "speedup", where, at_least=2),
        *judged.worst("paper patches: never below", of("paper"), "speedup", where, at_least=0.95),
        *judged.worst("default patches, N = 50 000, M <= 8, over a read of the keys", of("default", n=(50_000, 50_000), m=(1, 8)), "floor_ratio", where, at_most=1.3),
        *judged.worst("default patches, M >= 256, share of the int8 peak", of("default", m=(256, most)), "int8_peak_share", where, at_least=0.5),
        *judged.worst("adversarial patches, over dense", adversarial, "cost", where, at_most=1.1),
        *judged.worst("distance from float64, over the output", rows, "max_rel_err", where, at_most=1e-5),
    ]  # fmt: skip


def table(result: Mapping[str, Any]) -> Group:
    """Rows and goals for the terminal; a ± is the distance between the quartiles."""
    from rich.console import Group
    from rich.table import Table

    rows = result["rows"]
    threads = sorted({row["threads"] for row in rows})
    about = f"D={rows[0]['d']}, {', '.join(map(str, threads))} threads, ISA {result['isa']}" if rows else ""
    shown = Table(
        title=f"patch_ffn: {about}, {result['header']['machine']['cpu']}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    shown.add_column("patches")
    for head in ("N", "M", "dense ms", "kernel ms", "speed-up", "of a read", "survive %", "int8 peak %", "error"):
        shown.add_column(head, justify="right")
    for row in rows:
        odd = [row["dtype"]] * (row["dtype"] != "fp32") + [row["rows"]] * (row["rows"] != "read")
        odd += [f"{row['threads']} threads"] * (len(threads) > 1)
        shown.add_row(" ".join((row["patches"], *odd)), f"{row['n']:,}", str(row["m"]), *_cells(row))
    return Group(shown, "", judged.table(result["goals"])) if result["goals"] else Group(shown)


def _cells(row: Mapping[str, Any]) -> list[str]:
    def share(field: str) -> str:
        return "" if row[field] is None else f"{100 * row[field]:.3g}"

    times = [f"{row[f'{side}_ms']:.3g} ±{row[f'{side}_iqr_ms']:.1g}" for side in ("dense", "kernel")]
    rest = [f"{row['speedup']:.1f}x", f"{row['floor_ratio']:.2f}x"]
    return [*times, *rest, share("survivors_share"), share("int8_peak_share"), f"{row['max_rel_err']:.1e}"]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
