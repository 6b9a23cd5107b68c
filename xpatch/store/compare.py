"""What differs between two patch sets, edit by edit, and which languages each difference touches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from xpatch.patches import ledger
from xpatch.patches.compose import part_ownership
from xpatch.patches.forms import Gate, LanguageMask, LowRankDelta, Part, PatchNeurons
from xpatch.patches.types import EditRecord, PatchSet
from xpatch.store.views import short


@dataclass(frozen=True)
class EditChange:
    """One edit that differs. what: "request", "method", "status", "patch" (its rows' tensors, or where and how they act),
    "settings" (hyper-parameters, seed, group, message); () for an edit that is in one set only.

    languages: those its texts are in; where only some versions of the request differ, only those. () where it is redacted.
    """

    id: str
    what: tuple[str, ...]
    languages: tuple[str, ...]

    def __str__(self) -> str:
        what = f": {', '.join(self.what)}" if self.what else ""
        return f"{self.id}{what} ({', '.join(self.languages) or 'languages not recorded'})"


@dataclass(frozen=True)
class SetDiff:
    """From the set `before` to the set `after` (fingerprints). others: differences no edit owns: the base, shared rows, order."""

    before: str
    after: str
    added: tuple[EditChange, ...]
    removed: tuple[EditChange, ...]
    changed: tuple[EditChange, ...]
    same: int
    others: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether the sets differ."""
        return self.before != self.after

    @property
    def languages(self) -> tuple[str, ...]:
        """Every language that an added, removed or changed edit touches."""
        return tuple(sorted({code for edit in self.added + self.removed + self.changed for code in edit.languages}))

    def __str__(self) -> str:
        counts = (
            f"{len(self.added)} added, {len(self.removed)} removed, {len(self.changed)} changed, {self.same} the same"
        )
        lines = [f"{short(self.before)} -> {short(self.after)}: {counts}"]
        lines += [
            f"{sign} {edit}"
            for sign, edits in (("+", self.added), ("-", self.removed), ("~", self.changed))
            for edit in edits
        ]
        return "\n".join([*lines, *(f"~ {other}" for other in self.others)])


def compare(before: PatchSet, after: PatchSet) -> SetDiff:
    """Edits are matched by id. Sets of one fingerprint have no difference, and others always show at least one."""
    old, new = ({record.id: record for record in patches.edits} for patches in (before, after))
    was, now = _patches_of(before), _patches_of(after)
    changed, same = [], 0
    for id in (id for id in old if id in new):
        what = _differences(old[id], new[id], was[id] != now[id])
        if what:
            changed.append(EditChange(id, what, _touched(old[id], new[id], what)))
        else:
            same += 1
    added = tuple(EditChange(id, (), _languages(record)) for id, record in new.items() if id not in old)
    removed = tuple(EditChange(id, (), _languages(record)) for id, record in old.items() if id not in new)
    others = _others(before, after)
    if before.fingerprint != after.fingerprint and not (added or removed or changed or others):
        others = ("names or order of parts, edits or rows",)
    return SetDiff(before.fingerprint, after.fingerprint, added, removed, tuple(changed), same, others)


def _differences(old: EditRecord, new: EditRecord, patch: bool) -> tuple[str, ...]:
    settings = any(getattr(old, key) != getattr(new, key) for key in ("hyperparameters", "seed", "group", "message"))
    found = {
        "request": old.request != new.request,
        "method": old.method != new.method,
        "status": old.status != new.status,
        "patch": patch,
        "settings": settings,
    }
    return tuple(name for name, differs in found.items() if differs)


def _touched(old: EditRecord, new: EditRecord, what: tuple[str, ...]) -> tuple[str, ...]:
    if what != ("request",) or old.request is None or new.request is None:
        return tuple(sorted({*_languages(old), *_languages(new)}))
    versions = old.request.versions, new.request.versions
    differing = {code for code in {*versions[0], *versions[1]} if versions[0].get(code) != versions[1].get(code)}
    return tuple(sorted(differing or {*versions[0], *versions[1]}))


def _languages(record: EditRecord) -> tuple[str, ...]:
    return tuple(sorted(record.request.versions)) if record.request is not None else ()


def _patches_of(patches: PatchSet) -> dict[str, list[str]]:
    """Edit id -> what it does to the model, as digests: each part it has rows in, whatever the part is called."""
    ownership = part_ownership(patches)
    return {
        record.id: sorted(
            _digest(patches, patches.parts[name], None if ownership[name] == "shared" else list(rows))
            for name, rows in record.rows.items()
        )
        for record in patches.edits
    }


def _others(before: PatchSet, after: PatchSet) -> tuple[str, ...]:
    found = ["the base model"] if before.base != after.base else []
    if _unowned(before) != _unowned(after):
        found.append("rows or parts that no edit owns")
    for word, old, new in (("mask", before.masks, after.masks), ("gate", before.gates, after.gates)):
        for name in sorted({*old, *new}):
            if name not in old or name not in new or _content(old[name]) != _content(new[name]):
                languages = sorted(
                    {code for mask in (old.get(name), new.get(name)) for code in getattr(mask, "languages", ())}
                )
                found.append(f"{word} {name!r}" + (f" ({', '.join(languages)})" if languages else ""))
    return tuple(found)


def _unowned(patches: PatchSet) -> list[str]:
    owners, ownership = ledger.owners(patches), part_ownership(patches)
    found = []
    for name, part in patches.parts.items():
        if ownership[name] in ("bare", "empty"):
            found.append(_digest(patches, part, None))
        elif ownership[name] == "owned":
            rows = [row for row, owner in enumerate(owners[name]) if owner is None]
            found += [_digest(patches, part, rows)] if rows else []
    return sorted(found)


def _digest(patches: PatchSet, part: Part, rows: list[int] | None) -> str:
    """A part, or some rows of it, with the mask and the gate it acts through. None: all of it."""
    told = [part.form, part.site, getattr(part, "activation", None)]
    told += [None if part.mask is None else _content(patches.masks[part.mask])]
    told += [None if part.gate is None else _content(patches.gates[part.gate])]
    return _content(part, rows, *told)


def _content(value: Part | LanguageMask | Gate, rows: list[int] | None = None, *told: str | None) -> str:
    plain = [getattr(value, key, None) for key in ("languages", "kind", "threshold")]
    digest = hashlib.sha256(repr([*told, *plain]).encode())
    for name, tensor in value.tensors.items():
        if rows is not None and isinstance(value, (PatchNeurons, LowRankDelta)):
            tensor = tensor[:, rows] if name == "up" else tensor[rows]
        digest.update(f"\n{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
