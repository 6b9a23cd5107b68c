"""What language masks add to patch neurons: `mpn-masked` against `mpn`, on the verifier's validation facts.

    python -m xpatch.benchmarks.masked --json results.json

Same neurons and steps, three seeds. Edits are trained on all languages, on English and German, or on all but one, so that the languages
left out show what carries over by itself; they are read with a mask of ones. Every share is over the claims that the unpatched
model gets wrong in any language. `geometry` says how far the languages' rows of one claim are apart where the neurons read them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xpatch import zoo

from . import cache, machine, texts
from .crosslingual import measure
from .progress import Steps, steps
from .protocol import Protocol, bundled
from .trained_base import Base, read_once
from .trained_neurons import rows

SEEDS = (0, 1, 2)
MEMORY = 600  # bundled claims per language
LOCALITY = 150  # claims of each kind and language
RUNS: Sequence[tuple[str, str, Sequence[str] | None]] = (
    ("t-patcher", "own", None),
    ("mpn", "all", None),
    ("mpn-masked", "all", None),
    ("mpn", "en+de", ("en", "de")),
    ("mpn-masked", "en+de", ("en", "de")),
    *(
        (method, f"all but {left}", tuple(k for k in texts.LANGUAGES if k != left))
        for left in ("zh", "ar", "de")
        for method in ("mpn", "mpn-masked")
    ),
)
# Test subjects are for what is reported elsewhere: here only those of the classification step are looked at.
MEASURES = ("clg_needed_any", "clg_unseen_any", "unchanged_train")


def run(
    out: str | Path | None = None,
    *,
    runs: Sequence[tuple[str, str, Sequence[str] | None]] = RUNS,
    seeds: Sequence[int] = SEEDS,
    edits: int | None = None,
    model: Any = None,
    tokenizer: Any = None,
    protocol: Protocol | None = None,
    memory: Mapping[str, Sequence[Any]] | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure every (method, name, training languages) of `runs`; returns JSON values, written to `out` after every run.

    edits: at most so many requests. model, tokenizer, protocol, memory: instead of the bundled ones. work: folder for finished runs,
    by default beside `out`. overrides: settings of all methods.
    """
    if model is None:
        model, tokenizer = zoo.load("verifier")
        model = read_once(model)
    asked = bundled(edits, LOCALITY, split="validation") if protocol is None else protocol
    spared = texts.memory(asked.languages, MEMORY) if memory is None else memory
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    settings = dict(overrides)
    result: dict[str, Any] = {
        "benchmark": "masked",
        "unit": "percent",
        "header": machine.header(seeds, command),
        "protocol": {name: value for name, value in asked.describe().items() if name != "rules"},
        "settings": settings,
        "geometry": geometry(model, tokenizer, asked),
        "rows": [],
        "complete": False,
    }
    baseline = None
    with steps(progress, len(runs) * len(seeds)) as bar:
        for method, name, languages in runs:
            found = []
            for seed in seeds:
                bar.begin(f"{method}, {name}, seed {seed}")
                row, report = _one(
                    model, tokenizer, asked, method, seed, languages, spared, settings, folder, baseline, bar
                )
                baseline = baseline or report
                found.append(row)
                bar.end()
            result["rows"].append(_row(method, name, languages, found))
            result["complete"] = len(result["rows"]) == len(runs)
            if out is not None:
                machine.write_json(result, Path(out))
    return result


def _one(
    model: Any, tokenizer: Any, asked: Protocol, method: str, seed: int, languages: Sequence[str] | None,
    spared: Mapping[str, Sequence[Any]], settings: Mapping[str, Any], folder: Path | None, baseline: Any, bar: Steps,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    more = dict(settings) if languages is None else {**settings, "languages": list(languages)}
    key = cache.key(model, asked, {**more, "memory": len(spared)})[:16]
    store = None if folder is None else folder / f"{method}-{seed}-{key}.json.gz"
    kept = cache.load(store)
    if kept is not None:
        return kept[0], kept[1]["together"]
    row, report, _ = measure(model, tokenizer, asked, method, "default", seed, baseline, bar, memory=spared, **more)
    cache.keep(store, row, {"together": report})
    return row, report


def _row(method: str, name: str, languages: Sequence[str] | None, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": method,
        "trained_on": name,
        "languages": None if languages is None else list(languages),
    }
    row["patches"] = _spread([one["patches"] for one in found])
    for measure_ in MEASURES:
        row[measure_] = {k: _spread([one[measure_][k] for one in found]) for k in found[0][measure_]}
        row[f"{measure_}_avg"] = _spread([statistics.fmean(one[measure_].values()) for one in found])
    return row


def geometry(model: Any, tokenizer: Any, asked: Protocol) -> dict[str, Any]:
    """Distances at the input of the final FFN, per language: to the same claim in the first language, the same once each language's mean
    is taken off, to the nearest other claim of the first language; and how often that one is nearer than the claim's own row.

    retrieval: the share of claims whose row has its own claim's row nearest in the first language: as they are, without language means,
    and behind the diagonal mask that maps one language to the other best (least squares over the very claims: an upper bound).
    """
    languages = asked.languages
    base = Base(model, tokenizer, languages)
    x = {k: rows(base, [case.versions[k].text for case in asked.cases], "read")["x"] for k in languages}
    first = x[languages[0]]
    apart = torch.cdist(first, first)
    apart.fill_diagonal_(float("inf"))
    found: dict[str, Any] = {
        "norm": round(float(first.norm(dim=1).mean()), 2),
        "nearest_other_claim": round(float(apart.min(1).values.mean()), 2),
        "languages": {},
    }
    for language in languages[1:]:
        own = x[language]
        mask = (own * first).sum(0) / own.square().sum(0)
        centred, target = own - own.mean(0), first - first.mean(0)
        found["languages"][language] = {
            "distance": round(float((own - first).norm(dim=1).mean()), 2),
            "language_mean": round(float((own.mean(0) - first.mean(0)).norm()), 2),
            "distance_centred": round(float((centred - target).norm(dim=1).mean()), 2),
            "distance_masked": round(float((own * mask - first).norm(dim=1).mean()), 2),
            "retrieval": _nearest(own, first),
            "retrieval_centred": _nearest(centred, target),
            "retrieval_masked": _nearest(own * mask, first),
        }
    return found


def _nearest(rows_: torch.Tensor, first: torch.Tensor) -> float:
    hits = torch.cdist(rows_, first).argmin(1) == torch.arange(len(first))
    return round(100 * float(hits.float().mean()), 1)


def _spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation over seeds."""
    return [
        round(statistics.fmean(values), 2),
        round(statistics.stdev(values), 2) if len(values) > 1 else 0.0,
    ]


def table(result: Mapping[str, Any]) -> str:
    """The rows as Markdown: mean ± standard deviation over seeds."""
    languages = list(result["rows"][0]["unchanged_train"])
    head = [
        "method",
        "trained on",
        "patches",
        *(f"edits {k}" for k in languages),
        *(f"unseen {k}" for k in languages),
        "unchanged",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        cells = [row["method"], row["trained_on"], f"{row['patches'][0]:.0f}"]
        for name in MEASURES[:2]:
            cells += ["{:.1f} ± {:.1f}".format(*row[name][k]) for k in languages]
        cells.append("{:.2f} ± {:.2f}".format(*row["unchanged_train_avg"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `python -m xpatch.benchmarks.masked`."""
    parser = argparse.ArgumentParser(prog="python -m xpatch.benchmarks.masked", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--edits", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    found = parser.parse_args(argv)
    print(table(run(found.json, seeds=found.seeds, edits=found.edits)))


if __name__ == "__main__":
    main()
