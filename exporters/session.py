"""`Session`: an exported base in ONNX Runtime, with patch sets that come and go and are chosen by the row.

ONNX Runtime is silent in three cases: of two active adapters with the same names the first wins, an adapter wins over an input
of the same name, and adapters are ignored with IO binding. So patches are fed as plain inputs here, several sets side by side in
one tensor, and inputs that would collide are refused.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xpatch.errors import BackendError, ConflictError, FormatError, MismatchError
from xpatch.exporters._backend import require
from xpatch.exporters.adapter import read_adapter
from xpatch.exporters.description import METADATA_KEY, PAST, PRESENT, read_base
from xpatch.exporters.feed import Array, Feed, check_fit, fill, selection
from xpatch.exporters.generate import generate
from xpatch.exporters.inputs import prepared
from xpatch.exporters.slots import LANGUAGE
from xpatch.patches.expiry import without_expired
from xpatch.patches.store import load
from xpatch.patches.types import PatchSet
from xpatch.runtime.routing import Rows, is_switched_off, rows, rows_in_context, switched_off
from xpatch.runtime.status import PartStatus, SetStatus, Status

BASE = "__base__"
_CACHED = 32

Source = PatchSet | str | Path


@dataclass(frozen=True, eq=False)
class _State:
    """What a call sees from beginning to end: the sets by name, and their graph inputs, made once for each choice of sets."""

    sets: Mapping[str, PatchSet] = field(default_factory=dict)
    expired: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    feeds: dict[tuple[str, ...], tuple[Feed, dict[str, Any]]] = field(default_factory=dict)


class Session:
    """An ONNX Runtime session of an exported base, with the verbs a patched PyTorch model has.

    patches: sets, `.onnx_adapter` files or patch folders to begin with, as a mapping from names or a list (each under its own name).
    providers: of ONNX Runtime, in order of preference; default CUDA where it is there, then CPU. threads: of one call.
    allow: identity checks to leave out, as in `xpatch.apply`. Several threads may run, apply and remove at once: a call that is running
    finishes with the sets it began with, every later one sees the new state.
    Raises `FormatError` (a damaged base or adapter), `MismatchError` (a set for another base), `BackendError` (a missing provider).
    """

    def __init__(
        self,
        base_folder: str | Path,
        patches: Mapping[str, Source] | Sequence[Source] | Source = (),
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        allow: Iterable[str] = (),
    ) -> None:
        self.base = read_base(base_folder)
        self._allow = (allow,) if isinstance(allow, str) else tuple(allow)
        self._ort = require("onnxruntime")
        self.graphs = {
            name: self._open(Path(base_folder) / graph.file, providers, threads)
            for name, graph in self.base.graphs.items()
        }
        self._provider = next(iter(self.graphs.values())).get_providers()[0]
        self._device = "cuda" if self._provider == "CUDAExecutionProvider" else "cpu"
        self._state = _State()
        self._lock = threading.Lock()
        self._warned = False
        if isinstance(patches, (PatchSet, str, Path)):
            patches = [patches]
        for name, source in patches.items() if isinstance(patches, Mapping) else ((None, one) for one in patches):
            if name is None and _name_of(source) in self._state.sets:
                raise ConflictError(
                    f"two sets are called {_name_of(source)!r}; give them names: patches={{name: set, ...}}"
                )
            self.apply(source, name)

    @property
    def patches(self) -> dict[str, PatchSet]:
        """The applied sets by name, in the order they were applied."""
        return dict(self._state.sets)

    def apply(self, patches: Source, name: str | None = None) -> Session:
        """Switch a set, an `.onnx_adapter` file or a patch folder on; returns the session.

        name: how `remove`, `Rows` and `status` call it (default: its own); a set applied under a name that exists replaces that one, sets
        under different names add up. Expired edits are left out, and a warning names them. Raises `MismatchError` (for another base,
        a part without a slot), `ConflictError` (a reserved name); the session is then as it was.
        """
        name = name or _name_of(patches)
        if name == BASE:
            raise ConflictError(f"{BASE!r} means the unpatched model; give the set another name")
        whole = _read(patches)
        check_fit(whole, self.base, self._allow)
        current, expired = without_expired(whole)
        if expired:
            warnings.warn(f"patch set {name!r}: expired edits are not applied: {', '.join(expired[:5])}", stacklevel=2)
        alone = self._values_of([current])
        with self._lock:
            sets = {**self._state.sets, name: current}
            state = _State(sets, {**self._state.expired, name: expired}, {(name,): alone})
            with contextlib.suppress(ConflictError):  # sets that cannot act together can be chosen by the row
                state.feeds.setdefault(tuple(sets), self._values_of(list(sets.values())))
            self._state = state
        return self

    def remove(self, name: str | None = None) -> Session:
        """Switch the set `name` off, or all sets; returns the session. Raises `MismatchError` where none is called so."""
        with self._lock:
            sets = self._state.sets
            if name is not None:
                _check_names([name], sets)
            kept = {other: value for other, value in sets.items() if name is not None and other != name}
            self._state = _State(kept, {other: self._state.expired.get(other, ()) for other in kept})
        return self

    def disabled(self) -> AbstractContextManager[None]:
        """Within this context (this thread or task) the session answers as its base."""
        return switched_off(self)

    def rows(self, *args: Any, **choice: Any) -> AbstractContextManager[Rows]:
        """`Rows` for every call in this context (this thread or task), as `xpatch.rows`; an explicit `xpatch=` wins."""
        return rows(*args, **choice)

    def status(self) -> Status:
        """What is applied, as `xpatch.status` tells it; `kernel` is the provider that runs."""
        state, kernel = self._state, self._provider
        return Status(
            sets=tuple(
                SetStatus(name, found.fingerprint, len(found.edits), tuple(state.expired.get(name, ())))
                for name, found in state.sets.items()
            ),
            parts=tuple(
                PartStatus(name, part, value.site, value.form, value.count, value.nbytes, kernel, None)
                for name, found in state.sets.items()
                for part, value in found.parts.items()
            ),
        )

    def run(self, inputs: Mapping[str, Any], *, xpatch: Rows | None = None) -> dict[str, Array]:
        """One call: inputs (`input_ids` `[B, T]` and what else a tokenizer gives) -> `{"logits": [B, C] or [B, T, V]}`.

        Decoders take `past_key_values.*` of P tokens too, with an `attention_mask` `[B, P + T]`, and give `present.*`, which is the next
        call's past; a first call has none. Encoder-decoders take `decoder_input_ids` `[B, T]` (default: the start token); once they
        have a past, the text is not read again. xpatch: which sets and which language each row gets; without it, what `rows` said, else
        all sets for every row. Missing masks are all ones, missing token types all zeros. Raises `MismatchError` for unknown names or
        shapes, `ConflictError` for inputs that belong to patches and for sets whose language masks differ.
        """
        feed = prepared(self.base, inputs)
        return self._answer(feed, self.patch_inputs(len(next(iter(feed.values()))), xpatch=xpatch))

    def step(self, inputs: Mapping[str, Any], patches: Mapping[str, Any]) -> dict[str, Array]:
        """`run` with the patches that `patch_inputs` gave: several steps of one text keep them, whatever is applied meanwhile."""
        return self._answer(prepared(self.base, inputs), patches)

    def _answer(self, feed: dict[str, Array], patches: Mapping[str, Any]) -> dict[str, Array]:
        if self.base.kind != "encoder-decoder":
            return self._run("model", feed, patches)
        mask, past = feed.pop("attention_mask"), {name: feed[name] for name in feed if name.startswith(PAST)}
        crossed: dict[str, Array] = {}
        if "input_ids" in feed:
            crossed = self._run("encoder", {"input_ids": feed["input_ids"], "attention_mask": mask}, patches)
            del crossed["last_hidden_state"]
            past |= {PAST + name.removeprefix(PRESENT): value for name, value in crossed.items()}
        else:
            crossed = {PRESENT + one.name: past[PAST + one.name] for one in self.base.cache if one.cross}
        step = {"input_ids": feed["decoder_input_ids"], "encoder_attention_mask": mask, **past}
        return {**self._run("decoder", step, patches), **crossed}

    def generate(self, inputs: Mapping[str, Any], *, max_new_tokens: int = 20, xpatch: Rows | None = None) -> Array:
        """Greedy continuations, as `model.generate(do_sample=False)` of transformers: token ids `[B, T + new]` of a decoder, the
        prompt included; `[B, 1 + new]` of an encoder-decoder, the start token included.

        inputs: `input_ids` `[B, T]` and `attention_mask`; a decoder's prompts are padded on the left. Rows that ended are filled with the
        padding token. xpatch: as in `run`; the sets are those of the first token to the end. Raises as `run`, and `MismatchError` for a model that generates nothing.
        """
        return generate(self, inputs, max_new_tokens, xpatch)

    def _run(self, graph: str, feed: Mapping[str, Any], patches: Mapping[str, Any]) -> dict[str, Array]:
        outputs, own = list(self.base.graphs[graph].outputs), self.base.optional_inputs_of(graph)
        given = {**feed, **{name: value for name, value in patches.items() if name in own}}
        return dict(zip(outputs, self.graphs[graph].run(outputs, given), strict=True))

    def patch_inputs(self, batch: int, *, xpatch: Rows | None = None) -> dict[str, Any]:
        """The optional graph inputs of a call of `batch` rows, as OrtValues; `xpatch` as in `run`."""
        state, chosen = self._state, xpatch or rows_in_context() or Rows()
        wanted = [frozenset[str]()] if is_switched_off(self) else _wanted(chosen.patches, state.sets, batch)
        names = [name for name in state.sets if any(name in entry for entry in wanted)]
        feed, values = self._prepared(names, state)
        values = dict(values)
        keep = np.asarray([[name in entry for name in names] for entry in wanted], np.float32).reshape(
            len(wanted), len(names)
        )
        if not keep.all():
            values |= self._values(selection(feed, self.base, keep))
        index = self._language_index(chosen.languages, feed, batch)
        if index is not None:
            values |= self._values({LANGUAGE: index})
        return values

    def bind(self, binding: Any, batch: int, *, graph: str | None = None, xpatch: Rows | None = None) -> None:
        """Put the patches of a call into an `onnxruntime.IOBinding` of one of `graphs`, whose token inputs and outputs the caller binds.

        graph: where there is more than one. xpatch: as in `run`. (Adapters of ONNX Runtime itself are ignored with IO binding.) An input
        keeps its binding until another replaces it, so what this call does not use is bound to its default.
        """
        graph = graph or ("model" if "model" in self.graphs else "decoder")
        values = self.patch_inputs(batch, xpatch=xpatch)
        own = self.base.optional_inputs_of(graph)
        for name, default in self._defaults().items():
            if name in own:
                binding.bind_ortvalue_input(name, values.get(name, default))

    def _prepared(self, names: Sequence[str], state: _State) -> tuple[Feed, dict[str, Any]]:
        key = tuple(names)
        found = state.feeds.get(key)
        if found is None:
            found = self._values_of([state.sets[name] for name in names])
            while len(state.feeds) >= _CACHED:  # the oldest goes; another thread may have been first
                state.feeds.pop(next(iter(state.feeds)), None)
            state.feeds[key] = found
        return found

    def _values_of(self, sets: Sequence[PatchSet]) -> tuple[Feed, dict[str, Any]]:
        feed = fill(sets, self.base)
        return feed, self._values(feed.tensors)

    def _language_index(self, languages: Any, feed: Feed, batch: int) -> Array | None:
        if languages is None:
            if feed.languages and not self._warned:
                self._warned = True
                warnings.warn(
                    "the patches have language masks but this call names no languages: they are left out. "
                    "Pass xpatch=Rows(languages=...)",
                    stacklevel=4,
                )
            return None
        codes = [languages] if isinstance(languages, str) else list(languages)
        if not isinstance(languages, str) and len(codes) != batch:
            raise MismatchError(
                f"Rows(languages=...) expects one code, or one per row: {batch} rows, found {len(codes)} codes"
            )
        if not feed.languages:
            return None
        return np.asarray([feed.languages.index(code) + 1 if code in feed.languages else 0 for code in codes], np.int64)

    def _defaults(self) -> dict[str, Any]:
        arrays = {tensor.name: tensor.default for slot in self.base.slots for tensor in slot.tensors.values()}
        if self.base.masked:
            arrays[LANGUAGE] = np.zeros(1, np.int64)
        return self._values(arrays)

    def _values(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        return {name: self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0) for name, array in arrays.items()}

    def _open(self, path: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
        available = self._ort.get_available_providers()
        wanted = (
            list(providers)
            if providers
            else [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
        )
        missing = [name for name in wanted if name not in available]
        if missing:
            raise BackendError(
                f"ONNX Runtime has no {', '.join(missing)} here; it has {', '.join(available)}; install another build of it"
            )
        options = self._ort.SessionOptions()
        options.log_severity_level = (
            3  # it warns of every initializer that is an input, which is how patches are optional
        )
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = self._ort.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # ONNX Runtime raises many types of its own
            first = str(error).strip().splitlines()[0][:200]
            raise FormatError(f"{path} cannot be opened by ONNX Runtime ({first}); export the base again") from None
        found = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if found != self.base.digest:
            raise FormatError(f"{path} and the description beside it are not of one export; export the base again")
        return session


def _wanted(patches: Any, sets: Mapping[str, PatchSet], batch: int) -> list[frozenset[str]]:
    """The sets that each row gets; one entry where all rows get the same."""
    if patches is None or isinstance(patches, str):
        return [_names(patches, sets)]
    if len(patches) != batch:
        raise MismatchError(f"Rows(patches=...) expects one entry per row: {batch} rows, found {len(patches)} entries")
    return [_names(entry, sets) for entry in patches]


def _names(entry: str | Sequence[str] | None, sets: Mapping[str, PatchSet]) -> frozenset[str]:
    if entry is None:
        return frozenset(sets)
    names = [entry] if isinstance(entry, str) else list(entry)
    if BASE in names and len(names) > 1:
        raise MismatchError(f"{BASE!r} means no patches and cannot be combined; found {names}")
    names = [name for name in names if name != BASE]
    _check_names(names, sets)
    return frozenset(names)


def _check_names(names: Sequence[str], loaded: Mapping[str, PatchSet]) -> None:
    for name in names:
        if name not in loaded:
            raise MismatchError(
                f"no patch set is called {name!r}; applied are {', '.join(map(repr, loaded)) or 'none'}"
            )


def _name_of(source: Source) -> str:
    if isinstance(source, PatchSet):
        return source.name or source.fingerprint[:12]
    return Path(source).name.removesuffix(".onnx_adapter")


def _read(source: Source) -> PatchSet:
    if isinstance(source, PatchSet):
        return source
    return load(source) if Path(source).is_dir() else read_adapter(source)
