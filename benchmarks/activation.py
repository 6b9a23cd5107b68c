"""The neuron's gate: edits right, unseen paraphrases, unchanged predictions and the leak of silent neurons, from 10 to 10 000 edits.

    python -m xpatch.benchmarks.activation --json results.json

A silent GELU neuron still adds GELU(z) times its value; the sum over thousands is the leak. A silent ReLU neuron adds nothing.
Everything but the gate is equal: claims that need an edit, `mpn` with `SETTINGS`, trained in blocks that are put side by side
(activation_blocks.py); "relu-whitened" has the default's coordinates as well. Finished blocks are kept beside the result file; an interrupted run goes on where it stopped.
`factors` tells the gate's part of MPN's gain over Transformer-Patcher from the sampler's: 2 x 2, each by the methods' own procedure.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xpatch import EditRequest, zoo
from xpatch.evaluation import label_names
from xpatch.evaluation.bootstrap import estimate, tally

from . import cache, machine, trained_neurons
from .activation_blocks import Neurons, gathered, gathered_cases, many, other_subjects, trained
from .activation_leak import Gate, Rows, added, answers, leak
from .crosslingual import measure
from .progress import Steps, steps
from .protocol import Protocol, bundled
from .svg import Line, Panel, curves, lines
from .trained_base import SOURCES, Base, base

COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000)
# MPN's default as far as it does otherwise than Transformer-Patcher's training: keys are trained on rows as they are, which takes 200
# steps (the published procedure takes up to 2 000), and nobody looks at random texts or at the edits to come.
PLAIN: Mapping[str, Any] = {
    "coordinates": "plain", "memory_noise": 0, "mates": "earlier", "mates_per_step": 2000, "memory_per_step": 6000,
    "activation_weight": 1.0, "learning_rate": 1.5e-2, "weight_decay": 0.01, "steps": 200,
}  # fmt: skip
# As MPN's default has them.
WHITENED: Mapping[str, Any] = {
    "coordinates": "whitened", "memory_noise": 2000, "activation_weight": 2.0, "learning_rate": 5e-2, "weight_decay": 3e-3,
}  # fmt: skip
# Gates that are trained, and those that a trained one is served through. GELU is 0 in fp32 below -5.54: a margin of 8 puts silent
# neurons there in training, a shift of 2.6 does with the usual margin of 3.
GATES: Mapping[str, Mapping[str, Any]] = {
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "gelu-margin": {"activation": "gelu", "memory_margin": 8.0},
    "relu-whitened": {"activation": "relu", **WHITENED},
}
SERVED: Mapping[str, tuple[str, Gate]] = {
    **{name: (name, Gate()) for name in GATES},
    "gelu-shifted": ("gelu", Gate(shift=2.6)),
    "gelu-cut": ("gelu", Gate(cut=True)),
}
NAMES = {
    "gelu": "GELU, as the FFN",
    "relu": "ReLU",
    "relu-whitened": "ReLU, whitened coordinates",
    "gelu-margin": "GELU, trained with margin 8",
    "gelu-shifted": "GELU, served at z - 2.6",
    "gelu-cut": "GELU, silent neurons left out",
}
COLOURS = {"relu-whitened": 5, "gelu": 1, "relu": 3, "gelu-margin": 2, "gelu-shifted": 4, "gelu-cut": 0}
# Transformer-Patcher's plain training with fewer steps, memory rows and wordings, so that 10 000 neurons take five minutes on one core. Equal
# for all gates.
SETTINGS: Mapping[str, Any] = {
    **PLAIN, "steps": 60, "memory_per_step": 1000, "memory_top": 200, "rounds": 1, "rescue": False, "rephrases": False,
}  # fmt: skip
FACTORS: Mapping[str, Any] = {**PLAIN, "rephrases": True, "memory_languages": "all", "memory_rows": 12_000}
SAMPLE = 300  # edits measured at most, from the first N
WIDE_BLOCKS = (1, 3, 8, 15)  # of `trained_neurons`, of 280 to 360 neurons each
MEASURES = {
    "edited": "Edits right (%)",
    "unseen": "Unseen paraphrases right (%)",
    "unchanged": "Other subjects unchanged (%)",
}


def run(
    out: str | Path | None = None,
    *,
    counts: Sequence[int] = COUNTS,
    gates: Sequence[str] = tuple(SERVED),
    wide_blocks: Sequence[int] = WIDE_BLOCKS,
    seed: int = 0,
    locality: int | None = 300,
    factor_seeds: Sequence[int] = (0, 1, 2),
    factor_edits: int | None = None,
    source: Base | None = None,
    protocol: Protocol | None = None,
    memory: Mapping[str, Sequence[Any]] | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure the gates at each count, the kept neurons of width 768, and the 2 x 2; returns JSON values. With `out` the JSON and the
    charts are written, anew after every count.

    wide_blocks: blocks of `trained_neurons` to look at, none leaves that part out; so does an empty factor_seeds for the 2 x 2, whose
    claims factor_edits limits. source, protocol, memory: instead of the bundled verifier, its claims and its memory. overrides:
    settings of `mpn` for all gates.
    """
    folder = Path(work) if work else Path(out).with_suffix(".work") if out else None
    settings = {**SETTINGS, **overrides}
    points: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "benchmark": "activation", "unit": "percent", "header": machine.header([seed], command), "settings": settings,
        "factor_settings": dict(FACTORS), "points": points, "factors": [],
        "complete": False,
    }  # fmt: skip

    def keep() -> None:
        result["growth"] = growth(points)
        if out is not None and points:
            save(result, Path(out))

    with steps(progress, len(counts) + len(wide_blocks) + 4 * len(factor_seeds)) as bar:
        chosen = source or base("verifier")
        key = trained_neurons.key(chosen, [settings, seed])
        place = None if folder is None else folder / f"verifier-{key}"
        store = None if place is None else place / "needed.txt"
        claims = protocol or many(chosen, max(counts), locality, seed, store, bar.report)
        result["protocol"] = {
            name: value for name, value in claims.describe().items() if name not in ("rules", "edit_set")
        }
        samples = {count: [claims.cases[i] for i in _sample(count, seed)] for count in counts}
        measured = _Measured(chosen, samples, claims)
        for count in counts:  # all gates up to a count before any goes on: what is there can be compared
            bar.begin(f"{count} edits")
            for gate in gates:
                trains, served = SERVED[gate]
                neurons = trained(
                    chosen, claims.requests, count, {**settings, **GATES[trains]}, seed,
                    None if place is None else place / trains, memory=memory, report=bar.report,
                ).first(count)  # fmt: skip
                points.append(
                    {"source": "verifier", "gate": gate, "edits": count, **measured.at(neurons, count, served)}
                )
            bar.end()
            keep()
        if wide_blocks:
            points += wide(wide_blocks, seed, locality, bar)
            keep()
        if factor_seeds:
            result["factors"] = two_by_two(factor_seeds, factor_edits, locality, source, protocol, folder, bar)
            keep()
    result["complete"] = True
    keep()
    return result


def wide(blocks: Sequence[int], seed: int, locality: int | None, bar: Steps) -> list[dict[str, Any]]:
    """The neurons every kernel benchmark is timed on: D = 768, the presets `paper` (GELU) and `default` (ReLU) of `mpn`.

    They differ in more than the gate: this tells how the leak grows at BERT-base's width, not which gate is better.
    """
    chosen = base("wide", 1, bar.report, trained_neurons.FOLDER)
    samples = {number: gathered_cases(chosen, number, seed, 2 * SAMPLE) for number in blocks}
    edited = {version.text for cases in samples.values() for case in cases for version in case.versions.values()}
    parts, groups = other_subjects(chosen, edited, locality)
    measured = _Measured(chosen, samples, Protocol([], samples[blocks[-1]], parts["train"], parts["test"], groups))
    found = []
    for number in blocks:
        bar.begin(f"D = 768, {number} blocks")
        for preset, gate in (("paper", "gelu"), ("default", "relu")):
            neurons = gathered(chosen, preset, number, seed, trained_neurons.FOLDER, bar.report)
            served = (gate, "gelu-shifted", "gelu-cut") if gate == "gelu" else (gate,)
            for name in served:
                found.append(
                    {
                        "source": "wide",
                        "gate": name,
                        "edits": len(neurons.bias),
                        **measured.at(neurons, number, SERVED[name][1]),
                    }
                )
        bar.end()
    return found


def save(result: Mapping[str, Any], path: Path) -> None:
    """The JSON, and beside it a chart of the measures (.svg) and one of the leak (_leak.svg)."""
    machine.write_json(result, path)
    machine.write_text(chart(result), path.with_suffix(".svg"))
    machine.write_text(leak_chart(result), path.with_name(path.stem + "_leak.svg"))


class _Measured:
    """One classifier's texts, read once: the edits to ask at every count, and the locality claims."""

    def __init__(self, chosen: Base, samples: Mapping[int, Sequence[EditRequest]], protocol: Protocol) -> None:
        self.base, self.languages = chosen, protocol.languages
        self.samples = {count: [case.id for case in found] for count, found in samples.items()}
        cases = {case.id: case for found in samples.values() for case in found}
        gold = {name: index for index, name in enumerate(label_names(chosen.model))}
        self.labels = {name: gold[str(case.target)] for name, case in cases.items()}
        words: list[str] = []
        self.place: dict[tuple[str, str], list[int]] = {}  # canonical first, then unseen paraphrases
        for name, case in cases.items():
            for language in self.languages:
                version = case.versions[language]
                found = [version.text, *(probe.text for probe in version.rephrases)]
                self.place[name, language] = list(range(len(words), len(words) + len(found)))
                words += found
        self.edits = Rows.read(chosen, words)
        kinds = (("train", protocol.locality_train), ("test", protocol.locality_test))
        others = [(k, kind, i, probe.text) for kind, found in kinds for k in found for i, probe in enumerate(found[k])]
        self.others = Rows.read(chosen, [text for *_, text in others])
        self.spoken = [language for language, *_ in others]
        self.groups = [protocol.groups[kind][i] for _, kind, i, _ in others]
        self.before = answers(chosen, self.others)

    def at(self, neurons: Neurons, count: int, gate: Gate) -> dict[str, Any]:
        """Measures with the neurons of the first `count` edits."""
        picked = self.samples[count]
        keys = [(i, language) for i in picked for language in self.languages]
        index = torch.tensor([row for key in keys for row in self.place[key]])
        own = self.edits.take(index)
        more = added(neurons, own.x, gate)
        found = answers(self.base, own, more.loud + more.silent).tolist()
        right: dict[str, dict[str, tuple[list[str], list[bool]]]] = {"edited": {}, "unseen": {}}
        row = 0
        for i, language in keys:
            for number in range(len(self.place[i, language])):
                names, flags = right["unseen" if number else "edited"].setdefault(language, ([], []))
                names.append(i)
                flags.append(found[row] == self.labels[i])
                row += 1
        other = added(neurons, self.others.x, gate)
        after = answers(self.base, self.others, other.loud + other.silent)
        leaked = answers(self.base, self.others, other.silent)
        same: dict[str, tuple[list[str], list[bool]]] = {}
        for language, group, was, now in zip(
            self.spoken, self.groups, self.before.tolist(), after.tolist(), strict=True
        ):
            names, flags = same.setdefault(language, ([], []))
            names.append(group)
            flags.append(was == now)
        return {
            "patches": len(neurons.bias),
            **{name: _estimate(part) for name, part in right.items()},
            "unchanged": _estimate(same),
            "by_language": {
                name: {k: round(100 * float(np.mean(v[1])), 2) for k, v in part.items()}
                for name, part in (*right.items(), ("unchanged", same))
            },
            "leak": leak(self.others, other),
            "leak_on_edits": leak(own, more),
            "changed_by_leak_alone": round(100 * float((leaked != self.before).float().mean()), 3),
        }


def two_by_two(
    seeds: Sequence[int], edits: int | None, locality: int | None, source: Base | None, protocol: Protocol | None,
    folder: Path | None, bar: Steps,
) -> list[dict[str, Any]]:  # fmt: skip
    """Sampler (own language, all) x gate (GELU, ReLU) on the bundled edit set, over the same claims: those wrong in any language."""
    model, tokenizer = (source.model, source.tokenizer) if source else zoo.load("verifier")
    asked = bundled(edits, locality) if protocol is None else protocol
    cells, baseline = [], None
    for sampler, method in (("own", "t-patcher"), ("all", "mpn")):
        for gate in ("gelu", "relu"):
            runs = []
            for seed in seeds:
                bar.begin(f"sampler {sampler}, gate {gate}, seed {seed}")
                chosen = {**FACTORS, "activation": gate}
                key = cache.key(model, asked, chosen)[:16]
                store = None if folder is None else folder / f"{method}-{gate}-{seed}-{key}.json.gz"
                kept = cache.load(store)
                if kept is None:
                    row, report, _ = measure(model, tokenizer, asked, method, "default", seed, baseline, bar, **chosen)
                    cache.keep(store, row, {"together": report})
                else:
                    row, report = kept[0], kept[1]["together"]
                baseline = baseline or report
                runs.append(row)
                bar.end()
            wanted = ("clg_needed_any_avg", "clg_unseen_any_avg", "unchanged_avg", "patches")
            by = ("clg_needed_any", "clg_unseen_any", "unchanged")
            cells.append(
                {
                    "sampler": sampler,
                    "gate": gate,
                    **{name: _spread([row[name] for row in runs]) for name in wanted},
                    **{name: {k: _spread([row[name][k] for row in runs]) for k in runs[0][name]} for name in by},
                }
            )
    return cells


def growth(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Exponent of the mean leak's growth with N (least squares on logarithms, from 100 patches on), per source and gate."""
    found = []
    for source, gate in dict.fromkeys((p["source"], p["gate"]) for p in points):
        mine = [p for p in points if (p["source"], p["gate"]) == (source, gate) and p["patches"] >= 90]
        line: dict[str, Any] = {"source": source, "gate": gate}
        for name in ("mean", "apart"):
            pairs = [(math.log(p["patches"]), math.log(p["leak"][name])) for p in mine if p["leak"][name] > 0]
            slope = statistics.linear_regression(*zip(*pairs, strict=True)).slope if len(pairs) > 1 else None
            line[name] = None if slope is None else round(slope, 2)
        found.append(line)
    return found


def chart(result: Mapping[str, Any]) -> str:
    """The measures on the verifier as one SVG: a panel a measure, a curve a gate."""
    points = [point for point in result["points"] if point["source"] == "verifier"]
    panels = [
        Panel(
            title.removesuffix(" (%)"),
            [
                Line(
                    NAMES[gate],
                    [(p["edits"], *p[name]) for p in points if p["gate"] == gate and p[name]],
                    colour=COLOURS[gate],
                )
                for gate in dict.fromkeys(point["gate"] for point in points)
            ],
        )
        for name, title in MEASURES.items()
    ]
    note = "%, with 95 % bootstrap intervals (cut at the scale)"
    return lines("MPN (all) with different gates, against the number of edits", panels, "edits in place", note)


def leak_chart(result: Mapping[str, Any]) -> str:
    """The mean leak against the number of edits, a panel a source."""
    panels = []
    for source in dict.fromkeys(point["source"] for point in result["points"]):
        mine = [p for p in result["points"] if p["source"] == source and p["leak"]["mean"] > 1e-6]
        found = []
        for gate in dict.fromkeys(p["gate"] for p in mine):
            own = [(p["edits"], *(p["leak"][k] for k in ("mean", "mean", "mean"))) for p in mine if p["gate"] == gate]
            found.append(Line(NAMES[gate], own, colour=COLOURS[gate]))
        panels.append(Panel(f"{source}, D = {SOURCES.get(source, '')}", found))
    title = "What silent neurons add, as a share of the FFN's own output"
    note = "mean over claims about other subjects; gates that add nothing are not shown"
    return curves(title, panels, "edits in place", "of the FFN's output", note)


def _sample(count: int, seed: int) -> list[int]:
    return sorted(random.Random(f"sample:{seed}:{count}").sample(range(count), min(SAMPLE, count)))


def _estimate(found: Mapping[str, tuple[list[str], list[bool]]]) -> list[float] | None:
    if not found:
        return None
    made = estimate([tally(names, np.array(flags)) for names, flags in found.values()])
    return [round(100 * x, 2) for x in (made.value, made.low, made.high)]


def _spread(found: Sequence[float]) -> list[float]:
    """Mean and standard deviation over seeds."""
    return [round(float(np.mean(found)), 2), round(float(np.std(found, ddof=1)), 2) if len(found) > 1 else 0.0]


def table(result: Mapping[str, Any]) -> str:
    """Points and the 2 x 2 as Markdown."""
    rows = ["| source | gate | edits | patches | edited | unseen | unchanged | leak | p99 | apart | changed by leak |"]
    rows.append("|---" * 11 + "|")
    for p in result["points"]:
        shares = " | ".join(f"{p[name][0]:.1f}" for name in MEASURES)
        rows.append(
            f"| {p['source']} | {p['gate']} | {p['edits']} | {p['patches']} | {shares} | {p['leak']['mean']:.2e} | "
            f"{p['leak']['p99']:.2e} | {p['leak']['apart']:.2e} | {p['changed_by_leak_alone']} |"
        )
    for cell in result["factors"]:
        rows.append(json.dumps({k: v for k, v in cell.items() if not isinstance(v, dict)}))
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `python -m xpatch.benchmarks.activation`."""
    parser = argparse.ArgumentParser(prog="python -m xpatch.benchmarks.activation", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--wide-blocks", type=int, nargs="*", default=list(WIDE_BLOCKS))
    parser.add_argument("--locality", type=int, default=300)
    parser.add_argument("--factor-seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args(argv)
    result = run(
        found.json, counts=found.counts, wide_blocks=found.wide_blocks, seed=found.seed, locality=found.locality,
        factor_seeds=found.factor_seeds, steps=found.steps,
    )  # fmt: skip
    print(table(result))


if __name__ == "__main__":
    main()
