"""`edit` and `methods`: the one door to every editor, and the registry behind it."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from xpatch.editors.admission import Admitted, admit
from xpatch.editors.call import call_of
from xpatch.editors.checkpoint import Checkpoint
from xpatch.editors.guard import check_editable, untouched
from xpatch.editors.inputs import as_memory, check_languages, without_text
from xpatch.editors.journal import Journal
from xpatch.editors.presets import Config, resolve
from xpatch.editors.progress import Report, reporting
from xpatch.editors.subject import SubjectKind, subject_of
from xpatch.editors.task import Outcome, Product, Task
from xpatch.errors import FormatError, MismatchError
from xpatch.models.carried import carried
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
    "xpatch.editors.mpn_masked.editor",
    "xpatch.editors.ke.editor",
    "xpatch.editors.mend.editor",
    "xpatch.editors.lime.editor",
)


@dataclass(frozen=True)
class MethodInfo:
    """What one method is. `edits`: the models and inputs it can edit; `separable`: whether single edits can be taken out again.
    parallel: whether a request's other languages are trained on too. models: the kinds of models it edits. resumes: whether a call
    that was interrupted can go on (`checkpoint`)."""

    name: str
    title: str
    paper: str
    url: str
    edits: str
    separable: bool
    presets: tuple[str, ...] = ()
    parallel: bool = False
    models: tuple[SubjectKind, ...] = ("classifier",)
    resumes: bool = False


class Editor(Protocol):
    """One method. `edit` is called with the model in eval mode, gradients of its parameters off, texts and labels resolved.

    One that edits language models too (`info.models`) has presets of the same names for them, `lm_presets`.
    """

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
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> PatchSet:
    """Train `requests` into a `PatchSet` for `model`; the model is left bit-identical.

    model, tokenizer: a Hugging Face model in fp32 and its tokenizer: a sequence classifier, or a language model (encoder-decoder,
    decoder or masked), whose targets are texts (see `models.lm_prompts` for how they are read). requests: `EditRequest` objects, dicts, or the
    path of a JSONL file. method, preset: see `methods()`; `overrides` replace single settings of the preset.
    memory: texts whose answers must not change, as language -> texts or probes, or the path of a JSONL file of {"language", "text"}
    and, for pairs, "text_pair"; by default the bundled claims. The requests' own locality probes always belong to it. For a language
    model a probe with a "target" stands for the target's tokens, one without for its own tokens, or beside an encoder for those of
    the model's own greedy answer; the bundled claims are plain text to it, so give texts of your own kind where you can.
    languages: train on these versions only (a request's own language always takes part); by default on all.
    progress: None shows a bar on a terminal, True always, False never; a callable hears `(stage, done, total)`.
    checkpoint: a folder where a long call keeps what it has trained, chunk by chunk. A call that was interrupted goes on when made again
    with the same arguments, and gives bit for bit what it would have given; a finished one returns at once. For the methods that
    train in chunks (`methods()`: `resumes`). It takes as much room as the texts' rows do in memory until the call ends, then that of the
    patches; it may be removed afterwards.

    The edits are trained on the model as it answers now: patches applied to it count as part of it, so the result belongs on top
    of them. Equal arguments and seed give equal tensors; the global random state is not touched. Texts longer than the model
    allows are cut, which the edit's message says. Every request has a record in the set's ledger: "edited", "already-right" (it
    owns nothing), "failed" (still wrong), "lost" (right alone, wrong beside the other edits) or "rejected": it could not be tried
    and took no part, and its message says why. A language model's edit is right where every token of the target is, in every
    trained language, and greedy decoding says it.

    Rejected are a target that is missing, no label of the model or without tokens, an own-language text without words, requests
    that want different answers to one text (all of them, each naming another), and a repetition of an earlier request under
    another id. Where every request is rejected the set has no parts.

    Raises `FormatError` (a file or line that is no request, memory, an unknown method, preset or setting), `MismatchError` (a
    language no request has, a model that cannot be edited), `ConflictError` (a checkpoint of another call: it says what differs).
    """
    editor = _registry().get(method)
    if editor is None:
        raise FormatError(f"there is no method {method!r}; methods: {', '.join(sorted(_EDITORS))}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise FormatError(f"seed: expected an integer, found {seed!r}")
    parsed = as_requests(requests)
    check_editable(model)
    subject = subject_of(model, tokenizer)
    config = resolve(method, _presets_for(editor, subject.kind, model), preset, overrides)
    check_languages(parsed, languages)
    admitted = admit(parsed, lambda request: subject.resolve(request, languages), subject.index)
    kept = as_memory(memory, admitted.edits)
    settings = {"preset": preset, **config.model_dump()}
    with reporting(progress) as report, untouched(model):
        journal = Journal()
        if checkpoint is not None:
            _check_resumes(editor.info)
            base = identify(model, tokenizer, site=subject.site.name)
            device = next(model.parameters()).device.type
            call = call_of(method, settings, seed, languages, parsed, kept, base, carried(model), device)
            journal = Checkpoint(checkpoint, call)
            finished = journal.result()
            if finished is not None:
                report("resuming", len(parsed), len(parsed))
                return finished
        product = Product({}, ())
        if admitted.edits:
            bench = subject.bench(admitted.edits)
            bench.cache.journal = journal
            task = Task(
                model=model,
                site=subject.site,
                head=bench.head,
                edits=admitted.edits,
                memory=kept,
                cache=bench.cache,
                seed=seed,
                report=report,
                decoding=bench.decoding,
                tokenizer=tokenizer,
                journal=journal,
            )
            product = editor.edit(task, config)
        sites = [subject.site.name, *(part.site for part in product.parts.values())]
        base = identify(model, tokenizer, site=sites)
    outcomes = _outcomes(parsed, admitted, product, languages if editor.info.parallel else ())
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
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
        for request, outcome in zip(parsed, outcomes, strict=True)
    )
    patches = PatchSet(parts=product.parts, edits=records, masks=product.masks, gates=product.gates, base=base)
    if isinstance(journal, Checkpoint):
        journal.finish(patches)
    return patches


def _check_resumes(info: MethodInfo) -> None:
    if not info.resumes:
        able = sorted(name for name, other in _EDITORS.items() if other.info.resumes)
        raise MismatchError(
            f"checkpoint: method {info.name!r} cannot go on after an interruption; leave checkpoint out, or choose one that can: {', '.join(able)}"
        )


def _presets_for(editor: Editor, kind: SubjectKind, model: Any) -> Mapping[str, Config]:
    if kind not in editor.info.models:
        able = sorted(name for name, other in _EDITORS.items() if kind in other.info.models)
        raise MismatchError(
            f"method {editor.info.name!r} edits {', '.join(editor.info.models)} models, found {type(model).__name__}, a {kind} "
            f"model; methods for it: {', '.join(able) or 'none'}"
        )
    return editor.presets if kind == "classifier" else editor.lm_presets  # type: ignore[attr-defined, no-any-return]


def _outcomes(
    requests: Sequence[EditRequest], admitted: Admitted, product: Product, languages: Sequence[str] | None
) -> list[Outcome]:
    """One outcome per request, in order; the messages name those of `languages` (None: all) an edit has no text in."""
    found = {id: Outcome("rejected", why) for id, why in admitted.rejected.items()}
    for edit, outcome in zip(admitted.edits, product.outcomes, strict=True):
        missing = without_text(edit, languages)
        said = f"{outcome.message}; no text in {', '.join(missing)}" if missing else outcome.message
        found[edit.request.id] = replace(outcome, message=said)
    return [found[request.id] for request in requests]


def _registry() -> dict[str, Editor]:
    for module in _MODULES:
        importlib.import_module(module)
    return _EDITORS
