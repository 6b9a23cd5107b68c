"""Accuracy of the bundled verifier on each split and language, as a Markdown table."""

from __future__ import annotations

import xpatch.zoo
from xpatch.zoo.verifier.classify import accuracy, margins
from xpatch.zoo.verifier.facts import LANGUAGES, SHARES

MEANING = {"train": "facts of the classification step", "validation": "chose the stop and the threshold"}


def table() -> str:
    """One row a split, one column a language; percent of claims right over templates 0 and 2."""
    model, tokenizer = xpatch.zoo.load("verifier")
    rows = ["| split | " + " | ".join(LANGUAGES) + " |", "|---" * (len(LANGUAGES) + 1) + "|"]
    for split, _ in SHARES:
        found = accuracy(margins(model, tokenizer, split))
        name = f"{split} ({MEANING[split]})" if split in MEANING else split
        rows.append(f"| {name} | " + " | ".join(f"{100 * found[language]:.1f}" for language in LANGUAGES) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
