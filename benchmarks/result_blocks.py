"""The README's tables and sentences about trained editors, the demo, swapping, and where the cross-lingual figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import markdown


def trained_editors(result: Mapping[str, Any]) -> str:
    """KE, MEND and LiME: each edit alone, and all in one set."""
    heads = [
        "%",
        "success",
        "CLG mean",
        "unseen paraphrases",
        "others unchanged",
        "CLG mean, all in one set",
        "others unchanged",
    ]
    body = []
    for row in result["rows"]:
        alone, flips = row["alone"], row["together"]["flips"]
        figures = [alone[name] for name in ("success", "clg_avg", "unseen_avg", "unchanged_avg")]
        figures += [flips[name].get("avg") for name in ("clg", "unchanged")]  # nothing where no edit changed the model
        shown = ("" if figure is None else f"{figure:.1f}" for figure in figures)
        body.append([row["editor"].replace(":", ", "), *shown])
    edits, machine = result["rows"][0]["alone"]["edits"], result["header"]["machine"]
    note = (
        f"Trained editors on {edits} flipped claims of the validation facts, each edit alone on the base (the papers' protocol) and all in one set: "
        f"changes made for the base alone add up, and disturb each other. Seed {result['header']['seeds'][0]}, {machine['cpu']}."
    )
    return f"{markdown.table(heads, body)}\n\n{note}"


def swap_table(result: Mapping[str, Any]) -> str:
    """Swapping against redeploying, and what the soak, the kills and the damaged files found."""
    times = {
        f"replace a live set of {result['patches']} patches": "swap_ms",
        "the same, loading the set from its folder first": "load_and_swap_ms",
        "load the model again in the same process (weights mapped, not read)": "reload_ms",
        "the same, until it has answered once": "reload_answer_ms",
        "start a new process until it has answered once": "restart_ms",
    }
    body = [
        [what, f"{result[field]:.3g}", f"{result[field] / result['swap_ms']:,.0f}"]
        for what, field in times.items()
        if result.get(field) is not None
    ]
    idle = result["idle"]
    soak, crash, fuzz = (result.get(name) for name in ("soak", "crash", "fuzz"))
    notes = [
        f"BERT-base shape, while {result['inference_threads']} threads infer (the new process: nothing else runs).",
        f"Without that load a swap takes {idle['swap_ms']:.3g} ms and the reload {idle['reload_ms']:.3g} ms, {idle['ratio']:,.0f} swaps. "
        "The goal was a reload of a thousand swaps.",
    ]
    if soak:
        grown = "" if soak["rss_growth"] is None else f", memory {soak['rss_growth']:+.1f} %"
        notes.append(
            f"{soak['threads']} threads of inference against {soak['swaps']:,} applies and removes: {soak['outputs']:,} outputs compared "
            f"bit for bit, {soak['torn']} torn, {soak['stale']} stale, {soak['deadlocks']} deadlocks{grown}."
        )
    if crash:
        notes.append(
            f"{crash['kills']:,} kills among {crash['writes']:,} writes of a store: {crash['lost']} lost, {crash['torn']} torn."
        )
    if fuzz:
        notes.append(
            f"{fuzz['files']:,} hostile patch folders: {fuzz['crashed']} crashes, {fuzz['wrongly_accepted']} wrongly accepted."
        )
    if result.get("import_ratio") is not None:
        notes.append(
            f"`import xpatch` takes {result['import_ratio']:.2f} of `import torch`; with `xpatch.apply`, {result['import_in_use_ratio']:.2f}."
        )
    table = markdown.table(["a fix goes live", "median (ms)", "of a swap"], body)
    return f"{table}\n\n{' '.join(notes)}"


def origin(result: Mapping[str, Any]) -> str:
    """Sizes, machine, versions and command of a cross-lingual result."""
    header = result.get("header", {})
    asked = (
        [*result["protocol"].values()] if result.get("part") == "matrix" else [result.get("protocol", {})]
    )  # one a base
    machine = header.get("machine", {})
    where = ", ".join(
        str(fact) for fact in (machine.get("cpu"), f"{machine.get('cores')} cores", machine.get("gpu")) if fact
    )
    versions = ", ".join(
        f"{name} {header['versions'][name]}" for name in ("torch", "transformers") if name in header.get("versions", {})
    )
    locality = min((n for one in asked for n in one.get("locality_test", {}).values()), default=0)
    return (
        f"{', '.join(str(one.get('edit_set')) for one in asked)} claims about different subjects, {locality} locality claims of each kind and language, seeds "
        f"{', '.join(map(str, header.get('seeds', [])))}; {where}; {versions}. Made by `{header.get('command')}`; intervals "
        f"and every seed's row are in `benchmarks/results/`. {header.get('note', '')}".rstrip()
    )


def demo_note(demo: Mapping[str, Any]) -> str:
    """The demo's latency, and what removing its patches gave back."""
    latency = "; ".join(
        f"{name}: {found['p50_ms']:.2f} ({found['iqr_ms']:.2f})" for name, found in demo["latency"].items()
    )
    restored = "bit for bit" if demo["restored_bit_exact"] else "NOT bit for bit"
    onnx = (
        ""
        if demo.get("onnx_max_diff") is None
        else f" ONNX Runtime's logits differ from PyTorch's by at most {demo['onnx_max_diff']:.0e}."
    )
    return (
        f"From the demo, one claim a call, medians in ms (between the quartiles): {latency}. Removing the patches restored weights and "
        f"answers {restored}.{onnx}"
    )
