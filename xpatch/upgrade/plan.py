"""Which edits of a ledger can be trained again, and with which method, settings and seed each."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xpatch.editors import methods
from xpatch.errors import FormatError, MismatchError
from xpatch.evaluation.predict import label_names
from xpatch.models.lm_heads import lm_kind
from xpatch.patches.checks import thawed
from xpatch.patches.expiry import expiry_of
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import EditRecord, PatchSet


@dataclass(frozen=True)
class Batch:
    """Edits that are trained in one call: they share method, preset, settings and seed."""

    method: str
    preset: str
    settings: Mapping[str, Any]
    seed: int
    requests: tuple[EditRequest, ...]


@dataclass(frozen=True)
class Plan:
    """batches: in the order of their first edit. left_out: id -> ("rejected", "redacted" or "expired", why)."""

    batches: tuple[Batch, ...]
    left_out: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """Every request that is trained again."""
        return tuple(request for batch in self.batches for request in batch.requests)


def plan(
    patches: PatchSet,
    *,
    method: str | None = None,
    preset: str | None = None,
    seed: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> Plan:
    """Sort the ledger into batches; every record is in one of them or left out with its reason.

    An edit keeps the method, preset, settings and seed of its record. method, preset, seed replace them; the recorded settings go
    with another method or a named preset. overrides replace single settings. now: what expiry dates are compared with (aware).

    Raises `FormatError` for a set without a ledger or an expiry that is no date, `MismatchError` for a method there is not and where no edit is left.
    """
    if not patches.edits:
        raise FormatError(
            f"patch set {patches.name or patches.fingerprint[:12]!r}: its ledger holds no edits, so there is nothing to train again; "
            "give the requests themselves (xpatch edit --requests FILE)"
        )
    moment = now or datetime.datetime.now(datetime.timezone.utc)
    left_out: dict[str, tuple[str, str]] = {}
    batches: dict[str, Batch] = {}
    for record in patches.edits:
        reason = _why_not(record, moment)
        if reason is not None:
            left_out[record.id] = reason
            continue
        assert record.request is not None  # else it is redacted
        batch = _batch(record, method, preset, seed, overrides or {})
        key = json.dumps([batch.method, batch.preset, dict(batch.settings), batch.seed], sort_keys=True, default=repr)
        before = batches[key].requests if key in batches else ()
        batches[key] = Batch(batch.method, batch.preset, batch.settings, batch.seed, (*before, record.request))
    _check_methods(list(batches.values()))
    if not batches:
        words = sorted({word for word, _ in left_out.values()})
        raise MismatchError(
            f"none of the {len(left_out)} edits can be trained again: all are {' or '.join(words)}; "
            "give the requests themselves (xpatch edit --requests FILE)"
        )
    return Plan(tuple(batches.values()), left_out)


def check_labels(requests: Sequence[EditRequest], patches: PatchSet, model: Any) -> None:
    """Every label the requests ask for is one of `model`, with the meaning it had. Raises `MismatchError` naming those that are not.

    An index ("1") must stand for the label it stood for on the old base. A language model may be asked for any text.
    """
    if lm_kind(model) is not None:
        return
    names = label_names(model)
    old = patches.base.id2label if patches.base is not None else None
    unknown: dict[str, list[str]] = {}
    moved: dict[str, list[str]] = {}
    for request in requests:
        for target in _targets(request):
            if target in names:
                continue
            if not target.isdecimal() or int(target) >= len(names):
                unknown.setdefault(target, []).append(request.id)
            elif old is not None and old.get(int(target), names[int(target)]) != names[int(target)]:
                moved.setdefault(target, []).append(request.id)
    if unknown:
        raise MismatchError(
            f"the new base has no label {_named(unknown)}; its labels are {', '.join(names)}; give them the old names in the new "
            "model's config (id2label, label2id), or edit with requests that ask for the new ones"
        )
    if moved:
        assert old is not None
        meant = ", ".join(f"{target} was {old[int(target)]!r}, is {names[int(target)]!r}" for target in sorted(moved))
        raise MismatchError(
            f"labels asked for by index mean something else on the new base: {meant}; requests {_named(moved)}; "
            "put the labels of the new model's config in the old order, or edit with requests that name their labels"
        )


def _why_not(record: EditRecord, now: datetime.datetime) -> tuple[str, str] | None:
    if record.status == "rejected":
        return "rejected", record.message or "it was rejected when it was asked for"
    request = record.request
    if request is None:
        return "redacted", "its request was removed from the ledger"
    if request.expires is not None and expiry_of(request.expires, f"edit {record.id!r}, expires") <= now:
        return "expired", f"expired {request.expires}"
    bare = [language for language in request.versions if request.target_of(language) is None]
    if bare:
        return "redacted", f"its target was removed from the ledger ({', '.join(bare)})"
    return None


def _batch(
    record: EditRecord, method: str | None, preset: str | None, seed: int | None, overrides: Mapping[str, Any]
) -> Batch:
    recorded = dict(thawed(record.hyperparameters))
    own = str(recorded.pop("preset", "default"))
    name = method if method is not None else record.method
    if preset is not None or name != record.method:
        recorded, own = {}, "default"
    elif name in methods() and own not in methods()[name].presets:
        own = "default"  # a preset that is no longer there: its settings are all recorded
    return Batch(
        method=name,
        preset=preset if preset is not None else own,
        settings={**recorded, **overrides},
        seed=seed if seed is not None else record.seed or 0,
        requests=(),
    )


def _check_methods(batches: Sequence[Batch]) -> None:
    known = methods()
    for batch in batches:
        if batch.method not in known:
            ids = {batch.method: [request.id for request in batch.requests]}
            raise MismatchError(
                f"there is no method {_named(ids)}; methods: {', '.join(sorted(known))}; choose one of them (--method)"
            )
        if batch.preset not in known[batch.method].presets:
            raise FormatError(
                f"method {batch.method!r} has no preset {batch.preset!r}; presets: {', '.join(known[batch.method].presets)}"
            )


def _targets(request: EditRequest) -> list[str]:
    found = [request.target_of(language) for language in request.versions]
    found += [probe.target for version in request.versions.values() for probe in version.rephrases]
    return [target for target in dict.fromkeys(found) if target is not None]


def _named(ids: Mapping[str, Sequence[str]]) -> str:
    """'MAYBE' (12 edits, first 'a'), 'NO' (edit 'b')"""
    return ", ".join(
        f"{word!r} ({f'{len(found)} edits, first' if len(found) > 1 else 'edit'} {found[0]!r})"
        for word, found in sorted(ids.items())
    )
