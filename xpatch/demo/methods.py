"""The demo's table: every editor on the same edits, MPN's Table 1 columns, the paper's row beside each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xpatch.patches.types import PatchSet

METHODS = ("original", "ft", "t-patcher", "mpn-only", "mpn")
FIELDS = (
    "name", "patches", "reliability", "mlg", "clg", "clg_avg", "clg_needed", "clg_unseen", "locality_train", "locality_test",
    "unchanged", "edits", "edits_per_s",
)  # fmt: skip


def measure_all(
    model: Any, tokenizer: Any, protocol: Any, seed: int, tell: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], PatchSet]:
    """Train and measure every method of the table with its default preset: `(rows, examples, the patches of mpn)`.

    The rows are those of `xpatch bench crosslingual`, with intervals and the published row under `paper`.
    """
    from xpatch.benchmarks import crosslingual
    from xpatch.benchmarks import rows as benchmark_rows

    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    baseline = patches = None
    for number, method in enumerate(METHODS, start=1):
        preset = None if method == "original" else "default"
        tell(f"{number}/{len(METHODS)} {method}")
        row, report, found = crosslingual.measure(model, tokenizer, protocol, method, preset, seed, baseline)
        baseline = baseline or report
        rows.append(benchmark_rows.summarise([row], [report]))
        if method == "mpn":
            patches, examples = found, benchmark_rows.choose_examples(protocol, report)
    assert patches is not None
    return rows, examples, patches


def compact(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the demo's JSON holds them: the documented fields, then which method and preset it is, and the paper's row."""
    return [{key: row[key] for key in (*FIELDS, "method", "preset", "paper")} for row in rows]
