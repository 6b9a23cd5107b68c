"""The steps of the demo in order. Each prints what it found; the files appear in `out` as they are made."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import xpatch
from xpatch import zoo
from xpatch.demo import methods, serving
from xpatch.demo.answers import Answers, ask, comparison, most_wrong, wrong_languages
from xpatch.demo.undo import Witness
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import PatchSet

LOCALITY = 200  # claims of each kind and language
SHOWN_WRONG = 4
SHOWN_FIXED = 3
NAME = "demo"


def run(out: Path, *, edits: int, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Run the demo, write its files to `out`, and return what its JSON file holds.

    edits: claims in the edit set; those the verifier gets wrong in any language are edited. Files: `fixes/` (patch folder),
    `onnx/` and `fixes.onnx_adapter` (where the ONNX extra is installed), `report.html`.
    """
    from xpatch.benchmarks import machine, protocol, report

    started = time.perf_counter()
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = zoo.load("verifier")
    asked = protocol.bundled(edits, LOCALITY)
    requests = list(asked.requests)

    before = ask(model, tokenizer, requests)
    _show_wrong(console, requests, before)
    witness = Witness(model, tokenizer, _sample(requests, seed))

    _head(console, f"2. Training edits with {len(methods.METHODS) - 1} methods, and measuring what each of them did")
    rows, examples, patches = methods.measure_all(model, tokenizer, asked, seed, lambda text: _note(console, text))
    console.print(methods.paper_table(rows))
    console.print()
    console.print(methods.user_table(rows))

    xpatch.apply(model, patches, name=NAME, tokenizer=tokenizer)
    after = ask(model, tokenizer, requests)
    chosen = _most_fixed(requests, before, after)
    _head(console, f"3. {len(chosen)} claims before and after MPN (all)")
    console.print(comparison("", chosen, [("before", before), ("after", after)]))
    restored_one = _switch_one_off(console, model, tokenizer, patches, chosen[:1], before, after)

    xpatch.remove(model, NAME)
    restored = witness.restored()
    _head(console, "5. All patches off")
    console.print(
        f"{witness.bytes_compared:,} bytes of weights and answers compared: {'identical' if restored else 'DIFFERENT'}"
    )

    folder = _save(patches, out / "fixes")
    files, parity = _onnx(console, model, tokenizer, patches, out, requests)
    text = chosen[0].versions["en"].text if chosen else requests[0].versions["en"].text
    latency = serving.latency(model, tokenizer, patches, text, files)
    _show_latency(console, latency, patches)

    result = {
        "methods": methods.compact(rows),
        "restored_bit_exact": restored,
        "restored_bytes_compared": witness.bytes_compared,
        "switched_off_one": restored_one,
        "onnx_max_diff": None if parity is None else parity["max_diff"],
        "onnx_changed_predictions": None if parity is None else parity["changed"],
        "latency": latency,
        "seed": seed,
        "examples": examples,
        "header": machine.header([seed]),
        "seconds": round(time.perf_counter() - started, 1),
    }
    page = report.write({**result, "methods": rows, "protocol": asked.describe()}, out / "report.html")
    _head(console, "7. Left for you")
    for path in (folder, *(files or ()), page):
        console.print(Text(f"{path}  {_size(path)}"))
    return result


def _sample(requests: Sequence[EditRequest], seed: int) -> list[EditRequest]:
    return random.Random(seed).sample(list(requests), min(32, len(requests)))


def _show_wrong(console: Console, requests: Sequence[EditRequest], before: Answers) -> None:
    wrong = [request for request in requests if wrong_languages(request, before[request.id])]
    _head(console, f"1. The verifier gets {len(wrong)} of {len(requests)} claims wrong in at least one language")
    console.print(comparison("", most_wrong(requests, before, SHOWN_WRONG), [("answer", before)]))


def _most_fixed(requests: Sequence[EditRequest], before: Answers, after: Answers) -> list[EditRequest]:
    """The claims with the most languages wrong before and none wrong after."""
    fixed = [request for request in requests if not wrong_languages(request, after[request.id])]
    return most_wrong(fixed, before, SHOWN_FIXED)


def _switch_one_off(
    console: Console,
    model: Any,
    tokenizer: Any,
    patches: PatchSet,
    chosen: Sequence[EditRequest],
    before: Answers,
    after: Answers,
) -> bool | None:
    """Apply the set without one edit under the same name; whether that claim's old answers are back. None: nothing to switch."""
    if not chosen:
        return None
    name = chosen[0].id
    xpatch.apply(model, patches.drop([name]), name=NAME, tokenizer=tokenizer)
    off = ask(model, tokenizer, chosen)
    others = sum(bool(record.rows) for record in patches.edits) - 1
    _head(console, f"4. One edit off again: {name}; the other {others} stay on")
    console.print(comparison("", chosen, [("before", before), ("after", after), ("that edit off", off)]))
    return off[name] == before[name]


def _save(patches: PatchSet, folder: Path) -> Path:
    return Path(xpatch.save(patches, folder))


def _onnx(
    console: Console, model: Any, tokenizer: Any, patches: PatchSet, out: Path, requests: Sequence[EditRequest]
) -> tuple[tuple[Path, Path] | None, dict[str, Any] | None]:
    _head(console, "6. ONNX Runtime, and the time one claim takes")
    missing = serving.onnx_missing()
    if missing is not None:
        console.print(Text(f'Skipped ONNX: {missing} is not installed; pip install "xpatch[onnx]"'))
        return None, None
    files = serving.write_onnx(model, tokenizer, patches, out)
    parity = serving.parity(model, tokenizer, *files, requests)
    found = parity["languages"]
    compared = sum(one["texts"] for one in found.values())
    console.print(
        f"PyTorch and ONNX Runtime on {compared} claims in {len(found)} languages, patched and not: "
        f"largest difference {parity['max_diff']:.1e}, {parity['changed']} predictions differ"
    )
    return files, parity


def _show_latency(console: Console, latency: dict[str, dict[str, float]], patches: PatchSet) -> None:
    count = sum(part.count for part in patches.parts.values())
    for name, found in latency.items():
        console.print(f"{name:<26}{found['p50_ms']:8.2f} ms (quartiles {found['iqr_ms']:.2f} ms apart)")
    console.print(f"One claim a call; patched: {count} neurons, {patches.nbytes / 1024:.0f} KiB.")


def _head(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _note(console: Console, text: str) -> None:
    if console.is_terminal:
        console.print(Text(text, style="dim"))


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1024:.1f} KiB"
