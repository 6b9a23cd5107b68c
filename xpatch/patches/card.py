"""The `README.md` of a patch folder: what it is, how to use it, what it edits. It never quotes a request."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet

_LISTED_EDITS = 50


def card(patches: PatchSet, name: str | None) -> str:
    """The card's text (Markdown with a Hugging Face front matter); the same set gives the same text."""
    base = patches.base
    status: Counter[str] = Counter(record.status for record in patches.edits)
    methods = Counter(record.method for record in patches.edits)
    facts = {
        "Fingerprint": f"`{patches.fingerprint}`",
        "Base model": "hand-made, none recorded"
        if base is None
        else f"{base.architecture}, weights `{base.all_weights.fp32[:12]}`",
        "Edits": f"{len(patches)}" + (f" ({_counts(status)})" if status else ""),
        "Methods": _counts(methods) or "none",
        "Languages": ", ".join(patches.languages) or "none recorded",
        "Tensors": f"{patches.nbytes} bytes, fp32",
    }
    lines = [
        *("---", "library_name: xpatch", "tags:", "- xpatch", "- model-editing", "---", ""),
        *(f"# {_cell(name or 'Patches')}", "", "Patches for a multilingual transformer model, made with xpatch.", ""),
        *(
            "```python",
            "import xpatch",
            "",
            'model = xpatch.apply(model, xpatch.load("path/of/this/folder"))',
            "```",
            "",
        ),
        *("| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""),
        *("| part | form | site | rows |", "|---|---|---|---|"),
        *(f"| {key} | {part.form} | {_cell(part.site)} | {part.count or '-'} |" for key, part in patches.parts.items()),
    ]
    if patches.edits:
        lines += ["", "| edit | method | status | rows |", "|---|---|---|---|"]
        for record in patches.edits[:_LISTED_EDITS]:
            rows = sum(len(owned) for owned in record.rows.values())
            lines.append(f"| {_cell(record.id)} | {_cell(record.method)} | {record.status} | {rows or '-'} |")
        if len(patches) > _LISTED_EDITS:
            lines.append(f"| and {len(patches) - _LISTED_EDITS} more, see `patch_config.json` | | | |")
    lines += ["", "`patch_config.json` holds the ledger, `patch_model.safetensors` the tensors.", ""]
    return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {_cell(word)}" for word, number in sorted(counts.items()))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
