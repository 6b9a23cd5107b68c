"""Which patches and which language each row of a batch gets: `Rows`, the context forms, and their resolution per call."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import InitVar, dataclass
from typing import Any

import torch

from xpatch.errors import MismatchError
from xpatch.runtime.languages import AUTO, THRESHOLD, fill_in

#: The name of the unpatched model in `Rows(patches=...)`; no patch set can be called so.
BASE = "__base__"
_BATCHED = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids", "attention_mask")
_numbers = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, Rows] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Rows:
    """What each of the B rows of a batch gets.

    languages: one code for all rows or B codes; "auto" in place of a code has it identified from the row's text (py3langid, extra
    `[lid]`), None names none. patches: per row the name of an applied set, a list of names, "__base__" (none), or None (all sets);
    a single string holds for all rows. Without `patches` every row gets every set.

    For "auto": texts, one per row; candidates, the languages that can occur (the masks' own: naming them leaves far fewer rows
    undecided); below `threshold`, a probability, a row gets the language `default`. The texts are read here and not kept.
    Raises `MismatchError` for anything else, and when both are given with different lengths; `BackendError` without py3langid.
    """

    languages: str | Sequence[str | None] | None = None
    patches: str | Sequence[str | Sequence[str] | None] | None = None
    texts: InitVar[Sequence[str | None] | None] = None
    default: InitVar[str | None] = None
    threshold: InitVar[float] = THRESHOLD
    candidates: InitVar[Sequence[str] | None] = None

    def __post_init__(
        self,
        texts: Sequence[str | None] | None,
        default: str | None,
        threshold: float,
        candidates: Sequence[str] | None,
    ) -> None:
        for field, value in (("languages", self.languages), ("patches", self.patches)):
            if value is not None and not isinstance(value, str):
                if not isinstance(value, Sequence):
                    raise MismatchError(
                        f"Rows({field}=...): expected a string or a list, one entry per row; found {value!r}"
                    )
                object.__setattr__(self, field, tuple(value))
        if isinstance(self.languages, tuple):
            for row, language in enumerate(self.languages):
                if language is not None and not isinstance(language, str):
                    raise MismatchError(
                        f"Rows(languages=...), row {row}: expected a language code, {AUTO!r} or None; found {language!r}"
                    )
        if self.languages == AUTO or (isinstance(self.languages, tuple) and AUTO in self.languages):
            found = fill_in(self.languages, texts, candidates=candidates, default=default, threshold=threshold)
            object.__setattr__(self, "languages", found)
        if isinstance(self.patches, tuple):
            object.__setattr__(self, "patches", tuple(_names(entry, row) for row, entry in enumerate(self.patches)))
        if (
            isinstance(self.languages, tuple)
            and isinstance(self.patches, tuple)
            and len(self.languages) != len(self.patches)
        ):
            raise MismatchError(
                f"Rows: {len(self.languages)} languages but {len(self.patches)} patches entries; both need one entry per row"
            )
        number = next(_numbers)
        _alive[number] = self
        with torch.inference_mode(False):
            # Not a field: how a compiled graph, which may hold no Python value, is told which Rows a call was given.
            object.__setattr__(self, "token", torch.tensor([number], dtype=torch.int64, device="cpu"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.languages, self.patches)


@dataclass(frozen=True)
class Route:
    """`Rows` resolved against the applied sets. keep: set name -> True, False or one bool per row; None: everything everywhere."""

    languages: str | tuple[str | None, ...] | None = None
    keep: Mapping[str, bool | tuple[bool, ...]] | None = None
    batch: int | None = None


EVERYTHING = Route()
_ROWS: ContextVar[Rows | None] = ContextVar("xpatch_rows", default=None)
_DISABLED: ContextVar[frozenset[int]] = ContextVar("xpatch_disabled", default=frozenset())


@contextmanager
def rows(
    languages: str | Sequence[str | None] | None = None,
    patches: str | Sequence[str | Sequence[str] | None] | None = None,
    **auto: Any,
) -> Iterator[Rows]:
    """`Rows` for every model call in this context (this thread or task); an explicit `xpatch=` argument wins.

    auto: what `Rows` takes for languages="auto": texts, candidates, default, threshold.
    """
    value = Rows(languages, patches, **auto)
    token = _ROWS.set(value)
    try:
        yield value
    finally:
        _ROWS.reset(token)


@contextmanager
def switched_off(model: object) -> Iterator[None]:
    """Within this context (this thread or task) `model` computes what its base computes, bit for bit."""
    token = _DISABLED.set(_DISABLED.get() | {id(model)})
    try:
        yield
    finally:
        _DISABLED.reset(token)


def is_switched_off(model: object) -> bool:
    return id(model) in _DISABLED.get()


def rows_in_context() -> Rows | None:
    return _ROWS.get()


def rows_of_token(token: torch.Tensor) -> Rows:
    """The `Rows` whose token `[1]` a compiled graph was called with. Raises `MismatchError` where it is gone."""
    found = _alive.get(int(token))
    if found is None:
        raise MismatchError(
            "a compiled call was given a Rows that no longer exists; keep the Rows object until the call has returned, and make it "
            "outside of the compiled function"
        )
    return found


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The number of rows of a call: the first axis of its token ids (or of its first tensor); None where there is none."""
    named = [kwargs.get(name) for name in _BATCHED]
    for value in [*named, *args, *kwargs.values()]:
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return value.shape[0]
    return None


def resolve(chosen: Rows | None, names: Sequence[str], batch: int | None) -> Route:
    """`Rows` -> `Route` for a call of `batch` rows on a model with the sets `names`. Raises `MismatchError`."""
    if chosen is None:
        return EVERYTHING
    if not isinstance(chosen, Rows):
        raise MismatchError(
            f"the argument xpatch= takes xpatch.Rows(languages=..., patches=...); found {type(chosen).__name__}"
        )
    for field, value in (("languages", chosen.languages), ("patches", chosen.patches)):
        if isinstance(value, tuple) and batch is not None and len(value) != batch:
            raise MismatchError(
                f"Rows({field}=...) has {len(value)} entries but the batch has {batch} rows; give one entry per row of the batch as it is "
                "passed (beams and returned sequences follow their row), or one string for all. DataParallel splits batches: use one "
                "string for all there"
            )
    lists = [value for value in (chosen.languages, chosen.patches) if isinstance(value, tuple)]
    length = len(lists[0]) if lists else batch
    languages = (
        chosen.languages if isinstance(chosen.languages, str) else tuple(chosen.languages) if chosen.languages else None
    )
    return Route(languages=languages, keep=_keep(chosen.patches, names), batch=length)


def spread(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value `[B]` or line `[B, G]` per batch row -> one per leading row of x, whose B rows may have become k each, in a block.

    So are rows laid out for beams, for several returned sequences, for the choices of a multiple-choice model, and where a model
    flattens its tokens to `[B * T, D]`. Raises `MismatchError` for any other number of rows.
    """
    batch, lead = values.shape[0], x.shape[0]
    if lead == batch:
        return values
    if batch > 0 and lead % batch == 0:
        return values.repeat_interleave(lead // batch, 0)
    raise MismatchError(
        f"Rows names {batch} rows but a patched layer sees {lead} (shape {tuple(x.shape)}), which is no multiple: the batch was split or "
        "padded on the way (DataParallel does so). Give one string for all rows, or choose the rows inside each part of the batch"
    )


def _names(entry: Any, row: int) -> tuple[str, ...] | None:
    if entry is None:
        return None
    names = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, Sequence) else (entry,)
    if not all(isinstance(name, str) for name in names):
        raise MismatchError(
            f"Rows(patches=...), row {row}: expected a name, a list of names or {BASE!r}; found {entry!r}"
        )
    if BASE in names and len(names) > 1:
        raise MismatchError(
            f"Rows(patches=...), row {row}: {BASE!r} means no patches and cannot be combined; found {list(names)}"
        )
    return tuple(name for name in names if name != BASE)


def _keep(patches: Any, names: Sequence[str]) -> dict[str, bool | tuple[bool, ...]] | None:
    if patches is None:
        return None
    entries = [_names(patches, 0)] if isinstance(patches, str) else list(patches)
    applied, named = frozenset(names), set[str]()
    for row, entry in enumerate(entries):
        for name in entry or ():
            if name not in applied:
                raise MismatchError(
                    f"Rows(patches=...), row {row}: no patch set is called {name!r}; applied are {', '.join(map(repr, names)) or 'none'}"
                )
            named.add(name)
    keep: dict[str, bool | tuple[bool, ...]] = {}
    everything = None in entries
    for name in names:
        if name not in named and not everything:
            keep[name] = False  # of many applied sets a batch names few
            continue
        column = tuple(entry is None or name in entry for entry in entries)
        keep[name] = True if all(column) else False if not any(column) else column
    return keep
