"""Which language a text is in, for rows whose caller does not know: `Rows(languages="auto", texts=[...])`.

An explicit language always wins; what cannot be told is not guessed. The texts are identified by py3langid (langid.py, Lui and
Baldwin 2012), which is imported on first use: 0.8 s and 0.1 GB once, then 0.1 ms a text, 0.2 ms a long one.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xpatch.errors import BackendError, MismatchError
from xpatch.patches.locks import new_lock

AUTO = "auto"

#: Below this probability the language counts as unknown. Measured with py3langid 0.4.0 on 57,000 sentences and questions in 21
#: languages (median 42 characters), the languages served being the candidates. "left out": not identified, for whatever reason;
#: "wrong": share of error among those identified; short: Latin-script sentences cut to fewer than 20 characters, 6 candidates.
#:
#:     threshold                0.5   0.6   0.7   0.8   0.9   0.95  0.99
#:     6 candidates, left out   1.2   1.7   2.3   3.4   5.8   8.7  19.0 %
#:     6 candidates, wrong      0.31  0.21  0.15  0.09  0.04  0.01  0.01 %
#:     21 candidates, left out  2.0   3.2   4.9   7.4  12.1  17.4  30.6 %
#:     21 candidates, wrong     0.73  0.45  0.22  0.12  0.06  0.03  0.02 %
#:     short, left out          5.9   8.0  10.9  15.4  23.4  32.5  53.1 %
#:     short, wrong             1.82  1.29  0.74  0.44  0.23  0.08  0.06 %
THRESHOLD = 0.7

#: A language outside the candidates that is this many times as likely as the best of them is believed. Of texts in 15 other languages
#: 1.5 % still pass as one of 6 candidates at the threshold above; 30 % do where py3langid knows the candidates alone.
OUTSIDER = 3.0

#: Longer texts are judged by their beginning, which bounds the cost.
READ_CHARACTERS = 1000

# Codes counted under another one unless they are candidates themselves: members of a macrolanguage (ISO 639-3), older and newer codes.
_UNDER = {
    "wuu": "zh", "yue": "zh", "cmn": "zh", "arz": "ar", "ary": "ar", "arb": "ar", "nn": "no", "nb": "no", "sdh": "ku", "uzs": "uz",
    "fil": "tl", "iw": "he", "in": "id",
}  # fmt: skip
_NO_LANGUAGE = "zxx"
_LOCK = new_lock()
_warned = False


@dataclass(frozen=True)
class Identified:
    """One text's language and how it was found.

    language: the code to use, spelled as the candidates spell it, or None. guess: the likeliest code, whether it was used or not;
    None for a text without letters. probability: of the guess among the candidates, 0 to 1; of an outsider among all languages.
    how: "identified"; "other": in a language that is no candidate, so no mask is meant for it; "default": could not be told, the
    default was taken; "unknown": could not be told and there is no default.
    """

    language: str | None
    guess: str | None
    probability: float
    how: str


def identify(
    texts: Sequence[str],
    *,
    candidates: Iterable[str] | None = None,
    default: str | None = None,
    threshold: float = THRESHOLD,
) -> tuple[str | None, ...]:
    """The language of each text, or None where masks are to be left out; see `examine` for the rules and the errors.

    Warns once per process when the language of a text could not be told and no default is declared.
    """
    found = examine(texts, candidates=candidates, default=default, threshold=threshold)
    unknown = sum(one.how == "unknown" for one in found)
    if unknown and _first_time():
        warnings.warn(
            f"the language of {unknown} of {len(found)} rows could not be told (probability below {threshold:g}) and no default "
            "is declared: language masks are left out for them. Name the language, declare default=..., or narrow "
            "candidates=[...] to the languages served. This is said once",
            UserWarning,
            stacklevel=2,
        )
    return tuple(one.language for one in found)


def examine(
    texts: Sequence[str],
    *,
    candidates: Iterable[str] | None = None,
    default: str | None = None,
    threshold: float = THRESHOLD,
) -> tuple[Identified, ...]:
    """`identify` with the probabilities, for logs and for choosing a threshold. Safe to call from many threads.

    candidates: codes to choose from, such as a mask's languages; by default every language py3langid knows, among which short
    texts often stay below the threshold (21 % of those measured instead of 2 to 5 %). They are matched by their primary subtag
    ("zh-Hant" is found as "zh") and come back as given; where several share one ("zh-Hans", "zh-Hant"), the bare code or
    the default among them is taken, else the language stays unknown, for py3langid cannot tell them apart.
    default: what texts get whose best candidate is less probable than `threshold`, and texts without letters. A text in a
    language that is no candidate gets None.

    Raises `MismatchError` for texts that are not strings, bad options, and candidates of which py3langid knows none;
    `BackendError` where it is not installed.
    """
    _check(texts, default, threshold)
    plan = _plan(None if candidates is None else _codes(candidates))
    return tuple(_examine(text, plan, default, threshold) for text in texts)


def fill_in(
    languages: str | Sequence[str | None],
    texts: Sequence[str | None] | None,
    *,
    candidates: Iterable[str] | None = None,
    default: str | None = None,
    threshold: float = THRESHOLD,
) -> tuple[str | None, ...]:
    """`languages` with every "auto" replaced by the language of the row's text; a single "auto" stands for all rows.

    texts: one per row; only those of rows that say "auto" are read. Raises `MismatchError` where texts are missing or their number
    differs, and as `examine`.
    """
    rows = None if isinstance(languages, str) else len(languages)
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence) or rows not in (None, len(texts)):
        found = f"{len(texts)} texts" if isinstance(texts, (list, tuple)) else type(texts).__name__
        raise MismatchError(
            f"languages={AUTO!r} reads texts=[...], one per row; expected {'a list' if rows is None else f'{rows} texts'}, found {found}"
        )
    filled: list[str | None] = [languages] * len(texts) if isinstance(languages, str) else list(languages)
    asked = {row: texts[row] for row, language in enumerate(filled) if language == AUTO}
    chosen: list[str] = []
    for row, text in asked.items():
        if not isinstance(text, str):
            raise MismatchError(f"texts, row {row}: expected a text to identify; found {type(text).__name__}")
        chosen.append(text)
    if chosen:
        told = identify(chosen, candidates=candidates, default=default, threshold=threshold)
        for row, language in zip(asked, told, strict=True):
            filled[row] = language
    return tuple(filled)


def match(language: str | None, known: Sequence[str]) -> str | None:
    """The one of `known` that is meant by a language tag, or None: itself, else the longest prefix of it (RFC 4647, lookup: "zh-Hant-TW"
    finds "zh-Hant"), else the only one with its primary subtag ("zh" finds "zh_CN" where no other Chinese is known).
    """
    if language is None or language in known:
        return language
    return _match(language, tuple(known))


@functools.lru_cache(maxsize=4096)
def _match(language: str, known: tuple[str, ...]) -> str | None:
    by_tag: dict[str, str] = {}
    for code in known:
        by_tag.setdefault(_tag(code), code)
    words = _tag(language).split("-")
    for end in range(len(words), 0, -1):
        found = by_tag.get("-".join(words[:end]))
        if found is not None:
            return found
    related = [code for code in known if _primary(code) == words[0]]
    return related[0] if len(related) == 1 else None


@dataclass(frozen=True)
class _Plan:
    """How py3langid's labels are counted. counted: label -> the label it is counted under, of candidates alone where there are some;
    names: such a label -> the candidates it stands for; None: every language, under its own code."""

    counted: dict[str, str]
    names: dict[str, tuple[str, ...]] | None


@functools.lru_cache(maxsize=256)
def _plan(candidates: tuple[str, ...] | None) -> _Plan:
    labels = list(_identifier().labels)
    if candidates is None:
        return _Plan({label: _UNDER.get(label, label) for label in labels if label != _NO_LANGUAGE}, None)
    names: dict[str, tuple[str, ...]] = {}
    for code in candidates:
        primary = _primary(code)
        label = primary if primary in labels else _UNDER.get(primary, "")
        if label in labels:
            names[label] = (*names.get(label, ()), code)
    if not names:
        raise MismatchError(
            f"candidates: py3langid knows none of {', '.join(candidates)}; it knows {', '.join(sorted(labels))}; "
            "name the rows' languages instead"
        )
    counted = {label: label if label in names else _UNDER.get(label, label) for label in labels}
    return _Plan({label: under for label, under in counted.items() if under in names}, names)


def _examine(text: str, plan: _Plan, default: str | None, threshold: float) -> Identified:
    text = text[:READ_CHARACTERS]
    unsure = "unknown" if default is None else "default"
    if not any(character.isalpha() for character in text):
        return Identified(default, None, 0.0, unsure)
    ranked = dict(_identifier().rank(text))  # label -> probability, the likeliest first
    shares: dict[str, float] = {}
    for label, under in plan.counted.items():
        shares[under] = shares.get(under, 0.0) + ranked[label]
    best = max(shares, key=shares.__getitem__)
    if plan.names is not None:
        other = next((label for label in ranked if label not in plan.counted), _NO_LANGUAGE)
        if other != _NO_LANGUAGE and ranked[other] > OUTSIDER * shares[best]:
            return Identified(None, other, ranked[other], "other")
    total = sum(shares.values())
    probability = shares[best] / total if total > 0 else 0.0
    code = best if plan.names is None else _one_of(plan.names[best], best, default)
    if probability < threshold or code is None:
        return Identified(default, code or best, probability, unsure)
    return Identified(code, code, probability, "identified")


def _one_of(codes: tuple[str, ...], label: str, default: str | None) -> str | None:
    """The code to use for a label that stands for several candidates."""
    if len(codes) == 1:
        return codes[0]
    return next((code for code in codes if _tag(code) == label), default if default in codes else None)


@functools.lru_cache(maxsize=1)
def _load() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise BackendError('languages="auto" needs py3langid; run: pip install "xpatch[lid]"') from None
    if not hasattr(LanguageIdentifier, "from_model_file"):
        raise BackendError(
            'languages="auto" needs py3langid 0.4 or newer, found an older one; run: pip install --upgrade "xpatch[lid]"'
        )
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _identifier() -> Any:
    """One identifier for all threads and candidates: it is only read once loaded."""
    with _LOCK:
        return _load()


def _check(texts: object, default: object, threshold: object) -> None:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise MismatchError(f"texts: expected a list of texts, one per row; found {type(texts).__name__}")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise MismatchError(f"texts, row {row}: expected a text to identify; found {type(text).__name__}")
    if default is not None and (not isinstance(default, str) or not default.strip() or default == AUTO):
        raise MismatchError(f"default: expected a language code such as 'en', or None; found {default!r}")
    plain = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not plain or not (math.isfinite(threshold) and 0 <= threshold <= 1):  # type: ignore[arg-type,operator]
        raise MismatchError(f"threshold: expected a probability between 0 and 1; found {threshold!r}")


def _codes(candidates: Iterable[str]) -> tuple[str, ...]:
    if isinstance(candidates, (str, bytes)) or not isinstance(candidates, Iterable):
        raise MismatchError(f"candidates: expected a list of language codes; found {candidates!r}")
    codes = tuple(dict.fromkeys(candidates))
    for code in codes:
        if not isinstance(code, str) or not code.strip() or code == AUTO:
            raise MismatchError(f"candidates: expected language codes such as 'en' or 'zh-Hant'; found {code!r}")
    if not codes:
        raise MismatchError(
            "candidates: expected at least one language code; found none; leave it out for all languages"
        )
    return codes


def _tag(code: str) -> str:
    return code.replace("_", "-").casefold()


def _primary(code: str) -> str:
    return _tag(code).split("-")[0]


def _first_time() -> bool:
    global _warned
    with _LOCK:
        first, _warned = not _warned, True
        return first
