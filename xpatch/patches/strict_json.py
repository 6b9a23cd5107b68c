"""JSON from a file nobody vouches for: sizes known before it is parsed, every key once, finite numbers, whole Unicode.

`json.loads` alone takes a key twice, NaN, "1e999" and half a surrogate pair, and ends in a `RecursionError` when values nest
deeply. Here all of these are refused.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

from xpatch.errors import FormatError
from xpatch.patches.limits import Limits

DIGITS_AT_MOST = 100  # a seed has at most 39; far below the length at which Python refuses to convert
_CHUNK = 1 << 20
_MANY_DIGITS = re.compile(rb"[0-9]{%d}" % (DIGITS_AT_MOST + 1))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STEP = np.zeros(256, dtype=np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


class _NotPlain(ValueError):
    """JSON that parses, yet means nothing here."""


def read_json(data: bytes, *, where: str, limits: Limits) -> Any:
    """The value of a UTF-8 JSON text. Raises `FormatError` for anything else, and above `config_depth` or `config_values`."""
    _check_size(data, where, limits)
    # A Python call per number, so only where it can matter.
    more: dict[str, Any] = {"parse_int": _integer} if _MANY_DIGITS.search(data) else {}
    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, **more
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _damaged(where, "half a surrogate pair in a text") from None
    except ValueError as error:
        raise _damaged(where, str(error)) from None
    return value


def _check_size(data: bytes, where: str, limits: Limits) -> None:
    """Nesting and number of values, from brackets and commas outside texts; numpy reads them as fast as the file is read."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth = values = quotes = 0
    for start in range(0, len(data), _CHUNK):
        chunk = np.frombuffer(data, dtype=np.uint8, count=min(_CHUNK, len(data) - start), offset=start)
        quoted = np.cumsum(chunk == ord('"'), dtype=np.uint8) + np.uint8(quotes)  # its parity says inside or outside
        quotes = int(quoted[-1]) & 1
        plain = chunk[(quoted & 1) == 0]
        steps = _STEP[plain]
        values += int(np.count_nonzero(plain == ord(","))) + int(np.count_nonzero(steps > 0))
        limits.check("config_values", values, where)
        steps = steps[steps != 0]
        if len(steps):
            levels = np.cumsum(steps, dtype=np.int64) + depth
            limits.check("config_depth", int(levels.max()), where)
            depth = int(levels[-1])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotPlain(f"the key {twice[:60]!r} twice in one object")
    return made


def _constant(text: str) -> float:
    raise _NotPlain(f"{text}, which is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _NotPlain(f"the number {text[:40]}, which is not finite")
    return value


def _integer(text: str) -> int:
    if len(text) > DIGITS_AT_MOST:
        raise _NotPlain(f"a number of {len(text)} digits")
    return int(text)


def _damaged(where: str, found: str) -> FormatError:
    return FormatError(f"{where}: expected JSON, found {found}; the file is damaged, restore it or save the set again")
