"""What of an edit is left when the base is served in int8: edits trained in fp32, asked of PyTorch and of ONNX Runtime in fp32 and int8.

    python -m xpatch.benchmarks.quantized --json results.json

One patch set for all sides. `int8` is `export quantized`; `int8-defaults` what `quantize_dynamic` makes by itself (a scale for each whole
matrix and each whole embedding table), the patch slots left out there too.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import xpatch
from xpatch import zoo
from xpatch.evaluation import batches, measure
from xpatch.evaluation.questions import Question, case_questions, locality_questions
from xpatch.evaluation.runner import collect
from xpatch.evaluation.subject import subject_of
from xpatch.exporters import Session, export_base, quantize_base

from . import machine, markdown
from .progress import steps
from .protocol import Protocol, bundled

LOCALITY = 300  # claims of each kind and language
BATCH = 32
UNTRIED = ("already-right", "rejected")
SIDES = ("torch", "ort", "int8", "int8-defaults")
Ask = Callable[[Mapping[str, torch.Tensor]], np.ndarray]


def run(
    out: str | Path | None = None,
    *,
    edits: int | None = None,
    locality: int | None = LOCALITY,
    seed: int = 0,
    batch_size: int = BATCH,
    model: Any = None,
    tokenizer: Any = None,
    protocol: Protocol | None = None,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Train the edits, ask every side, and return the result as JSON values, written to `out` when it is given. Shares are percent.

    edits, locality: limits; by default the whole edit set and 300 claims of each kind and language. batch_size: texts of one call, sorted by
    length. model, tokenizer, protocol: instead of the bundled ones. overrides: settings of the editor.
    """
    if model is None:
        model, tokenizer = zoo.load("verifier")
    asked = bundled(edits, locality) if protocol is None else protocol
    subject = subject_of(model, tokenizer)
    questions = [
        *case_questions(subject, asked.cases),
        *locality_questions(subject, "locality_train", asked.locality_train, asked.groups.get("train")),
        *locality_questions(subject, "locality_test", asked.locality_test, asked.groups.get("test")),
    ]
    with steps(progress, 1 + len(SIDES)) as bar, tempfile.TemporaryDirectory() as folder:
        bar.begin("edit")
        patches = xpatch.edit(
            model, tokenizer, asked.requests, method="mpn", seed=seed, progress=bar.report, **overrides
        )
        bar.end()
        needed = {record.id for record in patches if record.status not in UNTRIED}
        bases = _bases(model, tokenizer, Path(folder))
        answers: dict[str, list[np.ndarray]] = {}
        sides: dict[str, dict[str, Any]] = {}
        for side in SIDES:
            bar.begin(side)
            asking = _torch(model, tokenizer, patches) if side == "torch" else _session(bases[side], patches)
            answers[side], seconds = _answers(asking, model, tokenizer, questions, batch_size)
            sides[side] = {
                **_measures(questions, needed, answers[side], answers["torch"], seed),
                "cpu_ms": [round(1000 * one / len(questions), 3) for one in seconds],
                "bytes": None if side == "torch" else sum(file.stat().st_size for file in bases[side].glob("*.onnx*")),
            }
            if side == "int8":
                sides[side]["alone"] = _alone(asking, model, tokenizer, questions, answers[side][1])
            if side == "torch":
                xpatch.remove(model)
            bar.end()
    result = {
        "benchmark": "quantized",
        "unit": "percent",
        "header": machine.header([seed], command),
        "protocol": {name: value for name, value in asked.describe().items() if name != "rules"},
        "edits": {"needed": len(needed), "patches": sum(part.count for part in patches.parts.values())},
        "texts": len(questions),
        "batch_size": batch_size,
        "settings": dict(overrides),
        "sides": sides,
    }
    if out is not None:
        machine.write_json(result, Path(out))
    return result


def _bases(model: Any, tokenizer: Any, folder: Path) -> dict[str, Path]:
    found = {side: folder / side for side in SIDES if side != "torch"}
    export_base(model, found["ort"], tokenizer=tokenizer)
    quantize_base(found["ort"], found["int8"])
    _defaults(found["ort"], found["int8-defaults"])
    return found


def _defaults(base: Path, out: Path) -> None:
    """What a user gets from ONNX Runtime's tool without more ado, once the patch slots are named to it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out.mkdir()
    shutil.copyfile(base / "xpatch_onnx.json", out / "xpatch_onnx.json")
    proto = onnx.load(str(base / "model.onnx"))
    del proto.graph.value_info[:]  # or its own shape inference fails
    slots = [node.name for node in proto.graph.node if node.name.startswith("xpatch_")]
    quantize_dynamic(proto, out / "model.onnx", weight_type=QuantType.QInt8, nodes_to_exclude=slots)


def _torch(model: Any, tokenizer: Any, patches: Any) -> tuple[Ask, Ask]:
    xpatch.apply(model, patches, name="edits", tokenizer=tokenizer)

    def ask(inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        with torch.no_grad():
            return model(**inputs).logits.argmax(-1).numpy()

    def base(inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        with xpatch.disabled(model):
            return ask(inputs)

    return base, ask


def _session(base: Path, patches: Any) -> tuple[Ask, Ask]:
    session = Session(base, {"edits": patches}, threads=torch.get_num_threads())

    def ask(rows: xpatch.Rows) -> Ask:
        return lambda inputs: session.run({k: v.numpy() for k, v in inputs.items()}, xpatch=rows)["logits"].argmax(-1)

    return ask(xpatch.Rows(patches="__base__")), ask(xpatch.Rows(patches="edits"))


def _answers(
    asking: Sequence[Ask], model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: int
) -> tuple[list[np.ndarray], list[float]]:
    """For each of `asking` the class of every question, and the processor seconds it took."""
    found: list[np.ndarray] = []
    seconds: list[float] = []
    calls = list(batches(model, tokenizer, [question.probe for question in questions], batch_size=batch_size))
    for ask in asking:
        answers = np.zeros(len(questions), np.int64)
        begun = time.process_time()
        for rows, inputs in calls:
            answers[rows] = ask(inputs)
        seconds.append(time.process_time() - begun)
        found.append(answers)
    return found, seconds


def _measures(
    questions: Sequence[Question],
    needed: set[str],
    own: Sequence[np.ndarray],
    fp32: Sequence[np.ndarray],
    seed: int,
) -> dict[str, Any]:
    predictions = collect(questions, own[0].tolist(), own[1].tolist())
    metrics = measure([(predictions, needed)], seed=seed)
    language = np.array([question.language for question in questions])
    moved = {
        name: {code: float((one != other)[language == code].mean()) for code in dict.fromkeys(language.tolist())}
        for name, one, other in zip(("changed_base", "changed_patched"), own, fp32, strict=True)
    }
    right = own[0] == np.array([question.gold for question in questions])
    unseen_subjects = np.array([question.kind == "locality_test" for question in questions])
    found = {
        "edited": {code: one.value for code, one in metrics.clg_needed.items()},
        "unseen": {code: one.value for code, one in metrics.clg_unseen.items()},
        "unchanged": {code: one.value for code, one in metrics.unchanged.items()},
        "base_accuracy": {
            code: float(right[unseen_subjects & (language == code)].mean()) for code in metrics.unchanged
        },
        **moved,
    }
    shares = {name: {**values, "mean": statistics.fmean(values.values())} for name, values in found.items()}
    averages = {"edited": metrics.clg_needed_avg, "unseen": metrics.clg_unseen_avg, "unchanged": metrics.unchanged_avg}
    return {
        **{name: {code: round(100 * one, 2) for code, one in values.items()} for name, values in shares.items()},
        "intervals": {k: [round(100 * v.low, 2), round(100 * v.high, 2)] for k, v in averages.items() if v is not None},
    }


def _alone(
    asking: tuple[Ask, Ask], model: Any, tokenizer: Any, questions: Sequence[Question], batched: np.ndarray
) -> dict[str, Any]:
    """The texts of the edits once more, one a call: int8 scales its inputs by what is in the call."""
    rows = [row for row, question in enumerate(questions) if question.kind == "edit"]
    (answers,), _ = _answers(asking[1:], model, tokenizer, [questions[row] for row in rows], 1)
    changed = answers != batched[rows]
    return {"texts": len(rows), "changed": round(100 * float(changed.mean()), 2)}


HEADS = {
    "edited": "edits right", "unseen": "unseen paraphrases", "unchanged": "unchanged", "base_accuracy": "base accuracy",
    "changed_base": "moved, base", "changed_patched": "moved, patched",
}  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """Means over the languages, then each language, as Markdown."""
    sides = result["sides"]
    means = [
        [
            side,
            "" if found["bytes"] is None else f"{found['bytes'] / 1e6:.1f}",
            f"{found['cpu_ms'][1]:.2f}",
            *(f"{found[name]['mean']:.2f}" for name in HEADS),
        ]
        for side, found in sides.items()
    ]
    languages = [code for code in sides["torch"]["edited"] if code != "mean"]
    each = [
        [f"{side}, {HEADS[name]}", *(f"{found[name][code]:.2f}" for code in languages)]
        for name in HEADS
        for side, found in sides.items()
    ]
    alone = sides["int8"]["alone"]
    return "\n\n".join(
        (
            markdown.table(["side", "MB", "CPU ms a text", *HEADS.values()], means),
            markdown.table(["", *languages], each),
            f"int8, {alone['texts']} texts of the edits asked one by one instead of {result['batch_size']} at a time: "
            f"{alone['changed']:.2f} % answered otherwise.",
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `python -m xpatch.benchmarks.quantized`."""
    parser = argparse.ArgumentParser(prog="python -m xpatch.benchmarks.quantized", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--edits", type=int)
    parser.add_argument("--locality", type=int, default=LOCALITY)
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args(argv)
    result = run(found.json, edits=found.edits, locality=found.locality, batch_size=found.batch_size, seed=found.seed)
    print(table(result))


if __name__ == "__main__":
    main()
