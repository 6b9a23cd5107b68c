"""Texts of random tokens: rows far from any memory, on which a patch must stay silent too."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

from xpatch.patches.requests import Probe

_LONGEST = 24
_TOKENS = 20_000  # of a larger vocabulary, so many are drawn from: each is decoded once a call
_LEAST = 8  # tokens that a script must have to be drawn from


def noise(tokenizer: Any, count: int, rng: random.Random, *, pairs: bool = False) -> list[Probe]:
    """At most `count` texts of 1 to 24 tokens: in turn drawn from the whole vocabulary, and from one script of it, as text in some
    other language is; pairs of them where `pairs`. Unknown tokens are a script of their own, the other special ones are left out.

    Fewer texts where the tokenizer decodes some to nothing, or has no vocabulary to draw from.
    """
    everything, scripts = _vocabulary(tokenizer, rng) if count else ([], [])

    def text(number: int) -> str:
        tokens = rng.choice(scripts) if number % 2 and scripts else everything
        return str(tokenizer.decode(rng.choices(tokens, k=rng.randint(1, _LONGEST)))).strip()

    drawn = [(text(number), text(number) if pairs else None) for number in range(count if everything else 0)]
    return [Probe(text=first, text_pair=second) for first, second in drawn if first and second != ""]


def _vocabulary(tokenizer: Any, rng: random.Random) -> tuple[list[int], list[list[int]]]:
    """All tokens but special ones, and those of each script by the first letter's name in Unicode."""
    special = set(tokenizer.all_special_ids)
    scripts: dict[str, list[int]] = {}
    size = len(tokenizer)
    for index in range(size) if size <= _TOKENS else sorted(rng.sample(range(size), _TOKENS)):
        if index not in special:
            scripts.setdefault(_script(str(tokenizer.decode([index]))), []).append(index)
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = [tokens for tokens in scripts.values() if len(tokens) >= _LEAST]
    if unknown is not None:
        found.append([unknown])
    return [index for tokens in scripts.values() for index in tokens], found


def _script(token: str) -> str:
    letter = next((letter for letter in token if letter.isalpha()), None)
    return "" if letter is None else unicodedata.name(letter, "").split(" ")[0]
