"""The finished parts of a benchmark on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xpatch

from .machine import header, write_json

_ROOMS = ("models", "ops", "patches", "runtime", "store")


def kept(
    folder: Path | None,
    name: str,
    settings: Mapping[str, Any],
    make: Callable[[], dict[str, Any]],
    code: Sequence[str] = (),
    rooms: Sequence[str] = _ROOMS,
) -> dict[str, Any]:
    """The part `name` from `folder`, else made now and kept there; with the time it was `made`.

    A part is found again when nothing that decides it has changed: its settings, the machine, the versions, the code of the
    package's `rooms` and of the benchmark files whose names begin with one of `code`. Without a folder nothing is kept.
    """
    store = None if folder is None else folder / f"{name}-{key(settings, code, rooms)}.json"
    if store is not None and store.is_file():
        found: dict[str, Any] = json.loads(store.read_text(encoding="utf-8"))
        return found
    part = {**make(), "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    if store is not None:
        store.parent.mkdir(parents=True, exist_ok=True)
        (store.parent / ".gitignore").write_text("*\n", encoding="utf-8")
        write_json(part, store)
    return part


def key(settings: Mapping[str, Any], code: Sequence[str] = (), rooms: Sequence[str] = _ROOMS) -> str:
    """16 hex digits over everything that decides a part."""
    where = header()
    decided = {"settings": dict(settings), "machine": where["machine"], "versions": where["versions"]}
    found = hashlib.sha256(json.dumps(decided, sort_keys=True).encode())
    package, here = Path(xpatch.__file__).parent, Path(__file__).parent
    paths = [
        package / "__init__.py",
        package / "api.py",
        *(path for room in rooms for path in sorted((package / room).rglob("*.py"))),
    ]
    for path in [*paths, *(path for name in code for path in sorted(here.glob(f"{name}*.py")))]:
        found.update(_meaning(path.read_bytes()))
    return found.hexdigest()[:16]


@functools.cache
def _meaning(source: bytes) -> bytes:
    """A digest of Python code; comments and layout decide nothing."""
    return hashlib.sha256(ast.dump(ast.parse(source)).encode()).digest()
