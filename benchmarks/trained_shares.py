"""How many (row, neuron) pairs fire, for each source, preset and kind of row; and the geometry that decides what can be screened out.

    python -m xpatch.benchmarks.trained_shares --json results.json

A pair fires above the activation's cut-off (`trained_scale.CUTS`). "read": rows the classifier's head reads; "tokens": rows of all tokens.
All rows are of held-out sentences; the mean and the principal directions are those of the memory's rows, which were trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine, trained_base
from .trained import TRAINED, Case, cases, memory_rows
from .trained_neurons import FOLDER
from .trained_scale import cut_of

POSITIONS = ("read", "tokens")
PRESETS = ("default", "paper")
RANKS = (16, 32, 64, 128)
QUANTILES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
BOUNDS = (0.005, 0.01)


def run(
    out: str | Path | None = None,
    *,
    neurons: Mapping[str, int] | None = None,
    presets: Sequence[str] = PRESETS,
    rows: int = 1024,
    seed: int = 0,
    folder: Path | None = FOLDER,
    bases: Mapping[str, trained_base.Base] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure; returns JSON values, written to `out` where given. neurons: source -> number of trained neurons. The others: as of `cases`."""
    neurons = dict.fromkeys(("verifier", "minilm", "wide"), TRAINED) if neurons is None else neurons
    points = []
    for source, count in neurons.items():
        base = (bases or {}).get(source) or trained_base.base(source, folder=folder)
        memory = memory_rows(base, folder)
        for preset in presets:
            for positions in POSITIONS:
                case = cases(
                    preset, count, rows, seed=seed, positions=positions, base=base, folder=folder, trained=count,  # type: ignore[arg-type]
                    settings=settings, progress=progress,
                )  # fmt: skip
                points.append({"source": source, "preset": preset, "positions": positions, **measure(case, memory)})
    result = {
        "benchmark": "firing_share",
        "unit": "percent",
        "header": machine.header([seed], command),
        "points": points,
    }
    if out is not None:
        machine.write_json(result, Path(out))
    return result


def measure(case: Case, memory: torch.Tensor) -> dict[str, Any]:
    """One case in figures: shares in percent of pairs, of ‖k‖² and of ‖x‖²; pre-activations and margins at quantiles.

    first_bound: pairs left by the exact score along the leading principal directions of the memory's rows and Cauchy-Schwarz on the
    rest, for rows minus the memory's mean.
    """
    keys, bias, x = case.keys, case.bias, case.x
    cut = cut_of(case.activation)
    mean = memory.mean(0)
    directions = torch.linalg.eigh(torch.cov(memory.T)).eigenvectors.flip(1)
    centred = x - mean
    z = torch.addmm(bias, x, keys.T)
    sizes = torch.outer(x.norm(dim=1), keys.norm(dim=1))
    fires = z > cut
    along, apart = keys @ directions, centred @ directions
    shift = torch.addmv(bias, keys, mean)
    ranks = [rank for rank in RANKS if rank < keys.shape[1]]
    own = torch.linalg.svdvals(keys).square()
    first = {}
    for rank in ranks:
        rest = torch.outer(apart[:, rank:].norm(dim=1), along[:, rank:].norm(dim=1))
        first[str(rank)] = _percent((apart[:, :rank] @ along[:, :rank].T + shift + rest > cut).double().mean())
    return {
        "width": keys.shape[1],
        "neurons": len(keys),
        "rows": len(x),
        "claims": dict(case.info["claims"]),
        "activation": case.activation,
        "cut": cut,
        "fires": _percent(fires.double().mean()),
        "rows_with_none": _percent((~fires.any(1)).double().mean()),
        "survives": {str(bound): _percent((z + bound * sizes > cut).double().mean()) for bound in BOUNDS},
        "first_bound": first,
        "z": _quantiles(z),
        "relative_margin_of_silent": _quantiles(((cut - z) / sizes)[~fires]),
        "key_norm": round(float(keys.norm(dim=1).mean()), 4),
        "bias": round(float(bias.mean()), 4),
        "row_norm": round(float(x.norm(dim=1).mean()), 4),
        "centred_row_norm": round(float(centred.norm(dim=1).mean()), 4),
        "key_energy_own": {str(rank): _percent(own[:rank].sum() / own.sum()) for rank in ranks},
        "key_energy": {str(rank): _percent(along[:, :rank].square().sum() / along.square().sum()) for rank in ranks},
        "row_energy": {str(rank): _percent(apart[:, :rank].square().sum() / apart.square().sum()) for rank in ranks},
    }


def table(result: Mapping[str, Any]) -> str:
    """The points as a Markdown table."""
    lines = [
        "| source | D | preset | rows | neurons | edits right | fire | survive ±0.01 | first bound, rank 64 | rows with none |",
        "|---" * 10 + "|",
    ]
    for p in result["points"]:
        claims = p["claims"]
        tried = sum(claims.get(name, 0) for name in ("edited", "failed", "lost"))
        lines.append(
            f"| {p['source']} | {p['width']} | {p['preset']} | {p['positions']} | {p['neurons']} | {claims.get('edited', 0)}/{tried} "
            f"| {p['fires']:.4f} % | {p['survives']['0.01']:.4f} % | {p['first_bound'].get('64', float('nan')):.3f} % "
            f"| {p['rows_with_none']:.1f} % |"
        )
    return "\n".join(lines)


def _percent(share: torch.Tensor) -> float:
    return round(100 * float(share), 5)


def _quantiles(values: torch.Tensor) -> dict[str, float]:
    flat = values.flatten()
    ordered = flat[:: max(1, len(flat) // 2_000_000)].sort().values
    return {
        str(q): round(float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]), 5)
        for q in QUANTILES
        if len(ordered)
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m xpatch.benchmarks.trained_shares", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--neurons", nargs="+", default=["wide=4500"], metavar="SOURCE=N")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where trained neurons are kept")
    found = parser.parse_args(argv)
    neurons = {source: int(count) for source, _, count in (item.partition("=") for item in found.neurons)}
    print(table(run(found.json, neurons=neurons, rows=found.rows, folder=found.folder)))


if __name__ == "__main__":
    main()
