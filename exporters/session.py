"""`PatchedSession`: an exported base in ONNX Runtime, with patch sets that are chosen per call and per row.

ONNX Runtime is silent in three cases: of two active adapters with the same names the first wins, an adapter wins over an input
of the same name, and adapters are ignored with IO binding. So patches are fed as plain inputs here, several sets side by side in
one tensor, and inputs that would collide are refused.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xpatch.errors import BackendError, ConflictError, FormatError, MismatchError
from xpatch.exporters._backend import require
from xpatch.exporters.adapter import read_adapter
from xpatch.exporters.feed import Array, Feed, check_fit, fill, selection
from xpatch.exporters.slots import LANGUAGE, METADATA_KEY, MODEL_FILE, read_base
from xpatch.patches.store import load
from xpatch.patches.types import PatchSet

BASE = "__base__"
_CACHED = 32

Source = PatchSet | str | Path
Names = str | Sequence[str] | None


class PatchedSession:
    """An ONNX Runtime session of an exported base.

    adapters: patch sets, `.onnx_adapter` files or patch folders, as a mapping from names or a list (each under its own name).
    providers: of ONNX Runtime, in order of preference; default CUDA where it is there, then CPU. threads: of one call.
    allow: identity checks to leave out, as in `xpatch.apply`. May be used by several threads; `load` and `unload` act on later calls.
    Raises `FormatError` (a damaged base or adapter), `MismatchError` (a set for another base), `BackendError` (a missing provider).
    """

    def __init__(
        self,
        base_folder: str | Path,
        adapters: Mapping[str, Source] | Sequence[Source] | Source = (),
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        allow: Iterable[str] = (),
    ) -> None:
        self.base = read_base(base_folder)
        self._allow = (allow,) if isinstance(allow, str) else tuple(allow)
        self._ort = require("onnxruntime")
        self.session = self._open(Path(base_folder) / MODEL_FILE, providers, threads)
        self._device = "cuda" if self.session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        self._sets: dict[str, PatchSet] = {}
        self._feeds: dict[tuple[tuple[str, int], ...], tuple[Feed, dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._warned = False
        if isinstance(adapters, (PatchSet, str, Path)):
            adapters = [adapters]
        for name, source in (
            adapters.items() if isinstance(adapters, Mapping) else ((None, source) for source in adapters)
        ):
            if name is None and _name_of(source) in self._sets:
                raise ConflictError(
                    f"two adapters are called {_name_of(source)!r}; give them names: adapters={{name: adapter, ...}}"
                )
            self.load(source, name)

    @property
    def patches(self) -> dict[str, PatchSet]:
        """The loaded sets by name, in the order they were loaded."""
        return dict(self._sets)

    def load(self, adapter: Source, name: str | None = None) -> str:
        """Load a set under `name` (default: its own), replacing one of that name; returns the name."""
        name = name or _name_of(adapter)
        if name == BASE:
            raise ConflictError(f"{BASE!r} means the unpatched model; give the adapter another name")
        patches = _read(adapter)
        check_fit(patches, self.base, self._allow)
        fill([patches], self.base)
        with self._lock:
            self._sets = {**self._sets, name: patches}
            self._feeds = {}
        return name

    def unload(self, name: str) -> None:
        """Forget a set. Raises `MismatchError` when there is none of that name."""
        _check_names([name], self._sets)
        with self._lock:
            self._sets = {key: value for key, value in self._sets.items() if key != name}
            self._feeds = {}

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        patches: Names = None,
        rows: Sequence[str | Sequence[str] | None] | None = None,
        languages: Names = None,
    ) -> dict[str, Array]:
        """One call: inputs (`input_ids` `[B, T]` and what else a tokenizer gives) -> `{"logits": [B, C]}`.

        patches: the sets all rows get, by name; None: all that are loaded; [] or "__base__": none. rows: instead, for each
        row a name, a list of names, "__base__", or None (all). languages: one code for all rows, or one per row; chooses the row of
        language masks where sets have them. Missing attention masks are all ones, missing token types all zeros.
        Raises `MismatchError` for unknown names or shapes, `ConflictError` for inputs that belong to patches.
        """
        feed = self._tokens(inputs)
        batch = feed["input_ids"].shape[0]
        feed |= self.patch_inputs(batch, patches=patches, rows=rows, languages=languages)
        return dict(zip(self.base.outputs, self.session.run(list(self.base.outputs), feed), strict=True))

    def patch_inputs(
        self,
        batch: int,
        *,
        patches: Names = None,
        rows: Sequence[str | Sequence[str] | None] | None = None,
        languages: Names = None,
    ) -> dict[str, Any]:
        """The optional graph inputs of a call of `batch` rows, as OrtValues; arguments as in `run`."""
        if rows is not None and patches is not None:
            raise MismatchError("give either patches= (for all rows) or rows= (one entry per row), not both")
        if rows is not None and (isinstance(rows, str) or len(rows) != batch):
            raise MismatchError(f"rows= expects one entry per row: {batch} rows, found {rows!r}")
        loaded = self._sets
        wanted = [self._chosen(entry, loaded) for entry in ([patches] if rows is None else rows)]
        names = [name for name in loaded if any(name in entry for entry in wanted)]
        feed, values = self._prepared(names, loaded)
        values = dict(values)
        keep = np.asarray([[name in entry for name in names] for entry in wanted], np.float32).reshape(
            len(wanted), len(names)
        )
        if not keep.all():
            values |= self._values(selection(feed, self.base, keep))
        index = self._language_index(languages, feed, batch)
        if index is not None:
            values |= self._values({LANGUAGE: index})
        return values

    def bind(self, binding: Any, batch: int, **choice: Any) -> None:
        """Put the patches of a call into an `onnxruntime.IOBinding`, whose token inputs and outputs the caller binds.

        choice: `patches`, `rows`, `languages` as in `run`. (Adapters of ONNX Runtime itself are ignored with IO binding.)
        An input keeps its binding until another replaces it, so what this call does not use is bound to its default.
        """
        values = self.patch_inputs(batch, **choice)
        for name, default in self._defaults().items():
            binding.bind_ortvalue_input(name, values.get(name, default))

    def _tokens(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        collisions = sorted(self.base.optional_inputs.intersection(inputs))
        if collisions:
            raise ConflictError(
                f"inputs {', '.join(collisions)} belong to patches; load a patch set and choose it with patches= instead"
            )
        unknown = sorted(set(inputs).difference(self.base.inputs))
        if unknown:
            raise MismatchError(
                f"unknown inputs {', '.join(unknown)}; the exported base takes {', '.join(self.base.inputs)}"
            )
        if "input_ids" not in inputs:
            raise MismatchError(f"expected input_ids [batch, tokens], found {', '.join(inputs) or 'nothing'}")
        ids = np.asarray(inputs["input_ids"], np.int64)
        if ids.ndim != 2 or (self.base.max_tokens is not None and ids.shape[1] > self.base.max_tokens):
            raise MismatchError(
                f"input_ids: expected [batch, tokens] with at most {self.base.max_tokens} tokens, found {list(ids.shape)}"
            )
        feed = {"input_ids": ids}
        for name in self.base.inputs[1:]:
            default = np.ones_like(ids) if name == "attention_mask" else np.zeros_like(ids)
            feed[name] = np.asarray(inputs[name], np.int64) if name in inputs else default
            if feed[name].shape != ids.shape:
                raise MismatchError(
                    f"{name}: expected the shape of input_ids, {list(ids.shape)}, found {list(feed[name].shape)}"
                )
        return feed

    def _chosen(self, entry: Names, loaded: Mapping[str, PatchSet]) -> frozenset[str]:
        if entry is None:
            return frozenset(loaded)
        names = [entry] if isinstance(entry, str) else list(entry)
        if BASE in names and len(names) > 1:
            raise MismatchError(f"{BASE!r} means no patches and cannot be combined; found {names}")
        names = [name for name in names if name != BASE]
        _check_names(names, loaded)
        return frozenset(names)

    def _prepared(self, names: Sequence[str], loaded: Mapping[str, PatchSet]) -> tuple[Feed, dict[str, Any]]:
        key = tuple((name, id(loaded[name])) for name in names)
        feeds = self._feeds
        if key not in feeds:
            feed = fill([loaded[name] for name in names], self.base)
            kept = dict(list(feeds.items())[-_CACHED + 1 :])
            kept[key] = feed, self._values(feed.tensors)
            with self._lock:
                if self._sets is loaded:  # else a set of that identity may be gone, and its identity be given again
                    self._feeds = kept
            return kept[key]
        return feeds[key]

    def _language_index(self, languages: Names, feed: Feed, batch: int) -> Array | None:
        if languages is None:
            if feed.languages and not self._warned:
                self._warned = True
                warnings.warn(
                    "the patches have language masks but this call names no languages: they are left out. Pass languages=",
                    stacklevel=4,
                )
            return None
        codes = [languages] if isinstance(languages, str) else list(languages)
        if not isinstance(languages, str) and len(codes) != batch:
            raise MismatchError(f"languages= expects one code, or one per row: {batch} rows, found {len(codes)} codes")
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


def _check_names(names: Sequence[str], loaded: Mapping[str, PatchSet]) -> None:
    for name in names:
        if name not in loaded:
            raise MismatchError(f"no patch set is called {name!r}; loaded are {', '.join(map(repr, loaded)) or 'none'}")


def _name_of(source: Source) -> str:
    if isinstance(source, PatchSet):
        return source.name or source.fingerprint[:12]
    return Path(source).name.removesuffix(".onnx_adapter")


def _read(source: Source) -> PatchSet:
    if isinstance(source, PatchSet):
        return source
    return load(source) if Path(source).is_dir() else read_adapter(source)
