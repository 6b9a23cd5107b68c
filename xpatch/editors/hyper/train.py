"""`train_editor`: train a hyper-network on requests, into a folder that `xpatch.edit(..., editor=FOLDER)` reads."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xpatch.editors.guard import check_editable, untouched
from xpatch.editors.hyper.folder import (
    CARD,
    TRAINING,
    WEIGHTS,
    EditorCard,
    LinearCard,
    fill,
    read_card,
    read_tensors,
    write_card,
    write_tensors,
)  # fmt: skip
from xpatch.editors.hyper.kinds import blueprint, kind_of, network_of
from xpatch.editors.hyper.objective import Trial
from xpatch.editors.hyper.processes import Processes
from xpatch.editors.hyper.sampling import Example, Sampler, as_examples
from xpatch.editors.hyper.sites import edited_linears
from xpatch.editors.hyper.texts import Encoder
from xpatch.editors.hyper.trainer import Progress, Trainer
from xpatch.editors.inputs import labels_of
from xpatch.editors.presets import resolve
from xpatch.editors.progress import Report, reporting
from xpatch.errors import ConflictError, FormatError, MismatchError
from xpatch.models.heads import head_of
from xpatch.patches.identity import identify
from xpatch.patches.probes import as_probe, read_probes
from xpatch.patches.requests import EditRequest, Probe, as_requests


@dataclass(frozen=True)
class Training:
    """A finished training. folder: the editor's; best_step: the step its weights are of; history: every validation; skipped: steps
    without a finite gradient."""

    folder: Path
    method: str
    steps: int
    best_step: int
    skipped: int
    history: tuple[Mapping[str, float], ...]
    seconds: float


def train_editor(
    model: Any,
    tokenizer: Any,
    data: Iterable[EditRequest | Mapping[str, Any]] | str | Path,
    method: str = "mend",
    *,
    out: str | Path,
    preset: str = "default",
    validation: Iterable[EditRequest | Mapping[str, Any]] | str | Path | None = None,
    locality: Mapping[str, Sequence[Any]] | str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | Report | None = None,
    **overrides: Any,
) -> Training:
    """Train the editor `method` ("mend", "ke", "lime-mend", "lime-ke") for `model` and write it to the folder `out`.

    model, tokenizer: a Hugging Face sequence classifier in fp32 (left bit-identical; its dropout is off while training) and its
    tokenizer. data: requests as in `xpatch.edit`; their versions are the parallel texts, their rephrases hold with the edit, their
    locality probes and all other requests' texts must stay. Targets are needed with `flips=None` alone. validation: requests of
    facts that are not in `data`; by default a share of `data` is kept apart. locality: further texts that must stay, as language ->
    texts or the path of a JSONL file. preset, overrides: see `xpatch.editors.hyper.config` and the methods' own; from which
    languages to which: `edit_languages`, `outer_languages` ("own", "all" or a list): "own", "own" is en->en, "own", "all" en->all.
    device: where to train; by default a GPU where there is one (a copy of the model goes there).

    A training that was interrupted goes on when called again with the same arguments and gives what it would have given; a
    finished one returns at once. Under `accelerate launch` or `torchrun` the processes share each step's edits.

    Raises `FormatError` (requests, settings, a damaged folder), `MismatchError` (labels, languages, a model that cannot be edited),
    `ConflictError` (`out` holds an editor of other settings, data or base).
    """
    begun = time.perf_counter()
    config: Any = resolve(method, kind_of(method).presets, preset, overrides)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise FormatError(f"seed: expected an integer, found {seed!r}")
    check_editable(model)
    processes, folder = Processes(), Path(out)
    if config.edits_per_step < processes.count * config.accumulate:
        raise FormatError(
            f"edits_per_step: expected at least {processes.count * config.accumulate} (processes x accumulate), found {config.edits_per_step}"
        )
    head = head_of(model)
    labels = labels_of(model, head.labels)
    requests = as_requests(data)
    held = None if validation is None else as_requests(validation)
    digest = _digest(requests, held, locality)
    train, kept = _split(
        as_examples(requests, labels), None if held is None else as_examples(held, labels), config, seed
    )
    extra = _locality(locality)
    sampler = Sampler(train, extra, config, seed)
    judge = Sampler(kept, extra, config, seed + 1)
    draws = [judge.draw(index) for index in range(config.validation_edits)]
    names = [str(model.config.id2label[index]) for index in range(head.labels)]
    base = identify(model, tokenizer, site=head.site.name)
    where = _device(model, device, processes)
    mine = model if next(model.parameters()).device == where else copy.deepcopy(model).to(where)
    with untouched(mine), reporting(progress if processes.is_first else False) as report:
        linears = edited_linears(mine, config.layers, config.matrices)
        card = EditorCard(
            method=method,
            preset=preset,
            settings=json.loads(config.model_dump_json()),
            seed=seed,
            languages=sampler.languages,
            linears=tuple(LinearCard(**vars(item)) for item in linears),
            base=base,
            data=digest,
        )
        _check_folder(folder, card)
        encoder = Encoder(mine, tokenizer)
        if not encoder.batched:
            raise MismatchError(
                "training needs batches of texts, and the model or its tokenizer has no padding token; set model.config.pad_token_id "
                "and tokenizer.pad_token"
            )
        text = getattr(config, "condition_text", "input")
        trial = Trial(mine, encoder, linears, names, text, config.precision)
        network = network_of(method, blueprint(method, mine, linears, sampler.languages, config, seed)).to(where)
        trainer = Trainer(trial, network, sampler, draws, config, seed, processes)
        if (folder / TRAINING).is_file():
            tensors, facts = read_tensors(folder / TRAINING)
            fill(network, _named(tensors), folder / TRAINING)
            trainer.restore(tensors, Progress(**facts))
        processes.wait()
        if processes.is_first:
            write_card(folder, card)
        trainer.run(report, lambda better: _keep(folder, trainer, better))
    return Training(
        folder=folder,
        method=method,
        steps=trainer.progress.step,
        best_step=trainer.progress.best_step,
        skipped=trainer.progress.skipped,
        history=tuple(trainer.progress.history),
        seconds=time.perf_counter() - begun,
    )


def _keep(folder: Path, trainer: Trainer, better: bool) -> None:
    """Write the best weights first: were the process to end between the two files, the step would be done again."""
    if trainer.processes.is_first:
        found = trainer.progress.history[-1]
        if better or not (folder / WEIGHTS).is_file():
            write_tensors(folder / WEIGHTS, trainer.network.state_dict(), {"validation": found})
        write_tensors(folder / TRAINING, trainer.state(), asdict(trainer.progress))
    trainer.processes.wait()


def _check_folder(folder: Path, card: EditorCard) -> None:
    if folder.is_file():
        raise FormatError(f"out: {folder} is a file; give a folder")
    if not (folder / CARD).exists():
        if folder.is_dir() and any(item.suffix != ".tmp" and item.name != ".gitignore" for item in folder.iterdir()):
            raise ConflictError(f"out: {folder} holds other files; give a folder that does not exist yet")
        return
    old = read_card(folder)
    for name in ("method", "seed", "data", "languages", "linears", "base"):
        if getattr(old, name) != getattr(card, name):
            raise ConflictError(
                f"out: {folder} holds an editor of another {name}; give another folder, or remove this one to begin anew"
            )
    differing = [name for name in card.settings if old.settings.get(name) != card.settings[name]]
    if differing:
        name = differing[0]
        raise ConflictError(
            f"out: {folder} holds an editor trained with {name}={old.settings.get(name)!r}, now {card.settings[name]!r}; "
            "give another folder, or remove this one to begin anew"
        )


def _split(
    examples: list[Example], held: list[Example] | None, config: Any, seed: int
) -> tuple[list[Example], list[Example]]:
    if held is not None:
        common = {example.id for example in examples} & {example.id for example in held}
        if common:
            raise FormatError(f"validation: request {sorted(common)[0]!r} is in the training data too; keep them apart")
        return examples, held
    count = max(2, round(config.validation_share * len(examples)))
    if len(examples) < count + 2:
        raise FormatError(
            f"data: expected at least {count + 2} requests (training and validation), found {len(examples)}"
        )
    chosen = set(random.Random(f"{seed}:validation").sample(range(len(examples)), count))
    return (
        [example for number, example in enumerate(examples) if number not in chosen],
        [example for number, example in enumerate(examples) if number in chosen],
    )


def _locality(given: Mapping[str, Sequence[Any]] | str | Path | None) -> dict[str, list[Probe]]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {
            str(language): [as_probe(item, f"locality, language {language!r}") for item in texts]
            for language, texts in given.items()
        }
    return read_probes(given, "locality file")


def _digest(requests: list[EditRequest], held: list[EditRequest] | None, locality: Any) -> str:
    rows = [[request.model_dump() for request in found or ()] for found in (requests, held)]
    extra = {k: [p.model_dump() for p in v] for k, v in _locality(locality).items()}
    text = json.dumps([rows, extra], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _device(model: Any, device: str | torch.device | None, processes: Processes) -> torch.device:
    own = next(model.parameters()).device
    if device is not None:
        return torch.device(device)
    if processes.device is not None:
        return processes.device
    return torch.device("cuda", torch.cuda.current_device()) if own.type == "cpu" and torch.cuda.is_available() else own


def _named(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("network.")}
