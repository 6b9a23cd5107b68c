"""`edit` and `methods`: the one door to every editor, and the registry behind it."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xpatch.editors.cache import FeatureCache
from xpatch.editors.guard import check_editable, untouched
from xpatch.editors.inputs import as_memory, labels_of, resolve_edits
from xpatch.editors.presets import Config, resolve
from xpatch.editors.progress import Report, reporting
from xpatch.editors.task import Product, Task
from xpatch.errors import FormatError
from xpatch.models.heads import head_of
from xpatch.patches.identity import identify
from xpatch.patches.requests import EditRequest, as_requests
from xpatch.patches.types import EditRecord, PatchSet

_MODULES = (
    "xpatch.editors.ft.editor",
    "xpatch.editors.ft_l.editor",
    "xpatch.editors.calinet.editor",
    "xpatch.editors.grace.editor",
    "xpatch.editors.t_patcher.editor",
    "xpatch.editors.mpn.editor",
)


@dataclass(frozen=True)
class MethodInfo:
    """What one method is. `edits`: the models and inputs it can edit; `separable`: whether single edits can be taken out again."""

    name: str
    title: str
    paper: str
    url: str
    edits: str
    separable: bool
    presets: tuple[str, ...] = ()


class Editor(Protocol):
    """One method. `edit` is called with the model in eval mode, gradients of its parameters off, texts and labels resolved."""

    @property
    def info(self) -> MethodInfo:
        """The registry's entry."""

    @property
    def presets(self) -> Mapping[str, Config]:
        """Configurations by name; "default" and "paper" are among them."""

    def edit(self, task: Task, config: Any) -> Product:
        """Train; must not change the model. One outcome per edit, in order."""


_EDITORS: dict[str, Editor] = {}


def register(editor: Editor) -> None:
    """Make an editor known under its name."""
    _EDITORS[editor.info.name] = editor


def methods() -> dict[str, MethodInfo]:
    """Every method there is, by name: its paper, what it can edit, its presets."""
    return {
        name: MethodInfo(**{**vars(editor.info), "presets": tuple(editor.presets)})
        for name, editor in sorted(_registry().items())
    }


def edit(
    model: Any,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]] | str | Path,
    method: str = "mpn",
    *,
    preset: str = "default",
    memory: Mapping[str, Sequence[Any]] | str | Path | None = None,
    seed: int = 0,
    languages: Sequence[str] | None = None,
    progress: bool | Report | None = None,
    **overrides: Any,
) -> PatchSet:
    """Train `requests` into a `PatchSet` for `model`; the model is left bit-identical.

    model, tokenizer: a Hugging Face sequence classifier in fp32 and its tokenizer. requests: `EditRequest` objects, dicts, or the
    path of a JSONL file. method, preset: see `methods()`; `overrides` replace single settings of the preset.
    memory: texts whose answers must not change, as language -> texts or probes, or the path of a JSONL file of {"language", "text"}
    and, for pairs, "text_pair"; by default the bundled claims. The requests' own locality probes always belong to it.
    languages: train on these versions only (a request's own language always takes part); by default on all.
    progress: None shows a bar on a terminal, True always, False never; a callable hears `(stage, done, total)`.

    The edits are trained on the model as it answers now: patches applied to it count as part of it, so the result belongs on top
    of them. Equal arguments and seed give equal tensors; the global random state is not touched. Texts longer than the model
    allows are cut, which the edit's message says. Every request has a record in the set's ledger: "edited", "already-right" (it
    owns nothing), "failed" (still wrong) or "lost" (right alone, wrong beside the other edits).

    Raises `FormatError` (requests, memory, an unknown method, preset or setting), `MismatchError` (a label or language that is
    not there, a model that cannot be edited).
    """
    editor = _registry().get(method)
    if editor is None:
        raise FormatError(f"there is no method {method!r}; methods: {', '.join(sorted(_EDITORS))}")
    config = resolve(method, editor.presets, preset, overrides)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise FormatError(f"seed: expected an integer, found {seed!r}")
    parsed = as_requests(requests)
    check_editable(model)
    head = head_of(model)
    edits = resolve_edits(parsed, labels_of(model, head.labels), languages)
    kept = as_memory(memory, edits)
    with reporting(progress) as report, untouched(model):
        task = Task(
            model=model,
            site=head.site,
            head=head,
            edits=edits,
            memory=kept,
            cache=FeatureCache(model, tokenizer, head.site),
            seed=seed,
            report=report,
        )
        product = editor.edit(task, config)
        base = identify(model, tokenizer, site=head.site.name)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    settings = {"preset": preset, **config.model_dump()}
    records = tuple(
        EditRecord(
            id=request.id,
            method=method,
            status=outcome.status,
            request=request,
            rows=outcome.rows,
            group=outcome.group,
            hyperparameters=settings,
            seed=seed,
            created=created,
            seconds=round(outcome.seconds, 4),
            message=outcome.message,
        )
        for request, outcome in zip(parsed, product.outcomes, strict=True)
    )
    return PatchSet(parts=product.parts, edits=records, gates=product.gates, base=base)


def _registry() -> dict[str, Editor]:
    for module in _MODULES:
        importlib.import_module(module)
    return _EDITORS
