"""A live fix against a redeploy: replacing an applied patch set, and loading the model from disk again."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import xpatch
from xpatch.patches.identity import BaseIdentity, identify
from xpatch.patches.types import EditRecord

from .imports import fresh
from .latency import measure
from .progress import steps

SWAPS, RELOADS = 101, 15
TOKENS = 32
PAUSE_S = 0.01
_RESTART = """
import torch
from transformers import BertForSequenceClassification
torch.set_num_threads({threads})
model = BertForSequenceClassification.from_pretrained({folder!r}).eval()
with torch.no_grad():
    model(input_ids=torch.ones(1, {tokens}, dtype=torch.long))
"""


def run(
    patches: int = 1000,
    threads: int | None = None,
    seed: int = 0,
    *,
    swaps: int = SWAPS,
    reloads: int = RELOADS,
    restart: bool = True,
    progress: bool | None = None,
    **config: Any,
) -> dict[str, Any]:
    """Median times on a BERT classifier of random weights (base size; `config`: other sizes), as JSON values.

    swap_ms: `xpatch.apply(model, patches, name="fixes")` where a set of `patches` one-neuron edits is replaced by another such
    set, while `threads` threads (default: one a core) call the model on one text of 32 tokens; 10 ms apart, because swaps back to
    back keep the interpreter and the caches for themselves (swap_hot_ms). The set's base is checked as always; the digests of the
    weights are known from before (first_apply_ms: the first apply on a model never seen, nothing else running). load_and_swap_ms: with
    `xpatch.load` of the set from its folder.

    reload_ms: `from_pretrained(folder).eval()` in the same process under the same load, files in the page cache, no tokenizer; the
    weights are mapped, not read. reload_answer_ms: until it has also answered once, which reads them; answer_ms: a usual answer.
    restart_ms: a fresh process that imports, loads and answers once, nothing else running: a redeploy where processes are replaced;
    left out without `restart`. ratio: reload_ms / swap_ms; ratios: of the other ways. idle: the same times without load.
    """
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(BertConfig(**config)).eval()
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=draw)
    site = f"bert.encoder.layer.{model.config.num_hidden_layers - 1}"
    base = identify(model, site=site)
    sets = [_set(patches, site, model.config.hidden_size, base, draw) for _ in range(2)]
    threads = threads or os.cpu_count() or 1
    turn = 0

    def swap() -> None:
        nonlocal turn
        turn += 1
        xpatch.apply(model, sets[turn % 2], name="fixes")

    with (
        steps(progress, 2 * (1 + 4) + restart) as bar,
        tempfile.TemporaryDirectory(prefix="xpatch-swap-") as folder,
        _quiet(),
        torch.no_grad(),
    ):
        model.save_pretrained(folder)
        fixes = [Path(folder) / f"fixes-{index}" for index in range(2)]
        for patches_folder, each in zip(fixes, sets, strict=True):
            xpatch.save(each, patches_folder)

        def reload() -> Any:
            return BertForSequenceClassification.from_pretrained(folder).eval()

        def load_and_swap() -> None:
            nonlocal turn
            turn += 1
            xpatch.apply(model, xpatch.load(fixes[turn % 2]), name="fixes")

        first = _first_apply(reload(), sets[0])
        _check_swaps(model, swap, ids)
        calls: Mapping[str, Callable[[], Any]] = {
            "load_and_swap": load_and_swap,
            "reload": reload,
            "reload_answer": lambda: reload()(input_ids=ids),
            "answer": lambda: model(input_ids=ids),
        }
        times: dict[str, dict[str, dict[str, float]]] = {"idle": {}, "load": {}}
        for name, busy in (("idle", 0), ("load", threads)):
            with _load(model, ids, busy):
                bar.begin(f"swap, {name}")
                times[name]["swap"] = _spaced(swap, swaps)
                times[name] |= measure({"swap_hot": swap}, swaps)
                bar.end()
                for what, call in calls.items():
                    bar.begin(f"{what}, {name}")
                    times[name] |= measure({what: call}, reloads, warmup=1)
                    bar.end()
        command = _RESTART.format(threads=torch.get_num_threads(), folder=folder, tokens=TOKENS)
        bar.begin("restart")
        restarted = fresh({"restart": command}, reloads)["restart"] if restart else None
    fresh_process = {"restart": restarted} if restarted else {}
    headline = _headline({**times["load"], **fresh_process})
    return {
        **headline,
        "ratios": {
            name: round(value / headline["swap_ms"], 1)
            for name, value in headline.items()
            if name in ("reload_answer_ms", "restart_ms")
        },
        "first_apply_ms": first,
        "idle": _headline(times["idle"]),
        "iqr_ms": {
            name: {what: value["iqr_ms"] for what, value in found.items()}
            for name, found in {**times, "fresh process": fresh_process}.items()
        },
        "patches": patches,
        "inference_threads": threads,
        "repeats": {"swap": swaps, "reload": reloads},
        "page_cache": "warm",
        "model": {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())},
    }


def _headline(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The medians, and how many swaps a reload takes."""
    medians = {f"{name}_ms": found["p50_ms"] for name, found in times.items()}
    return {**medians, "ratio": round(medians["reload_ms"] / medians["swap_ms"], 1)}


def _set(patches: int, site: str, width: int, base: BaseIdentity, draw: torch.Generator) -> xpatch.PatchSet:
    """`patches` neurons at `site`, each an edit of its own in the ledger."""
    keys, values = (0.1 * torch.randn(patches, width, generator=draw) for _ in range(2))
    neurons = xpatch.PatchNeurons(site, keys, torch.randn(patches, generator=draw), values, "relu")
    edits = tuple(
        EditRecord(id=f"e{index}", method="mpn", status="edited", rows={"neurons.0": (index,)})
        for index in range(patches)
    )
    return xpatch.PatchSet(parts={"neurons.0": neurons}, edits=edits, base=base)


def _spaced(call: Callable[[], None], repeats: int) -> dict[str, float]:
    """As `latency.measure` of one call, with a pause before each: back to back it would keep the interpreter for itself."""
    times = []
    for _ in range(repeats):
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "p50_ms": round(middle, 4),
        "iqr_ms": round(high - low, 4),
        "p25_ms": round(low, 4),
        "p75_ms": round(high, 4),
    }


def _first_apply(model: Any, patches: xpatch.PatchSet) -> float:
    start = time.perf_counter()
    xpatch.apply(model, patches, name="fixes")
    return round(1000 * (time.perf_counter() - start), 1)


def _check_swaps(model: Any, swap: Callable[[], None], ids: torch.Tensor) -> None:
    """Raises `BackendError` unless every swap changes the answer."""
    answers = [model(input_ids=ids).logits]
    for _ in range(2):
        swap()
        answers.append(model(input_ids=ids).logits)
    base, one, other = answers
    if torch.equal(base, one) or torch.equal(one, other):
        raise xpatch.BackendError(
            f"swap benchmark: expected another answer after each apply, found {[answer.tolist() for answer in answers]}"
        )


@contextmanager
def _load(model: Any, ids: torch.Tensor, threads: int) -> Iterator[None]:
    """`threads` threads call the model until the context ends, after each has answered once. Errors of theirs are raised."""
    stop, failures = threading.Event(), []
    ready = threading.Barrier(threads + 1)

    def infer() -> None:
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                model(input_ids=ids)
                ready.wait(60)
                while not stop.is_set():
                    model(input_ids=ids)
        except Exception as error:
            failures.append(error)
            ready.abort()

    workers = [threading.Thread(target=infer, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        ready.wait(60)
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    if failures:
        raise failures[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars of transformers: dozens of loads are timed."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


if __name__ == "__main__":
    print(run())
