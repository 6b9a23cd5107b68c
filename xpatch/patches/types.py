"""What an edit leaves behind: the ledger and `PatchSet`, over the five forms of `xpatch.patches.forms` (also named here).

All are values: checked when made (`FormatError`), fields cannot be assigned, mappings are read-only; tensors must not be
written to. Copying a value, deeply or not, gives the value itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from xpatch.errors import FormatError
from xpatch.patches import checks
from xpatch.patches.forms import ACTIVATIONS, DenseDelta, Gate, LanguageMask, LowRankDelta, Part, PatchNeurons, Value
from xpatch.patches.identity import BaseIdentity
from xpatch.patches.requests import EditRequest
from xpatch.patches.signatures import Signature, carried

if TYPE_CHECKING:
    from xpatch.watch.conflicts import ConflictReport

__all__ = [
    "ACTIVATIONS",
    "DenseDelta",
    "EditRecord",
    "EditStatus",
    "Gate",
    "LanguageMask",
    "LowRankDelta",
    "Part",
    "PatchNeurons",
    "PatchSet",
    "STATUSES",
]

STATUSES = ("edited", "already-right", "failed", "lost", "rejected")
EditStatus = Literal["edited", "already-right", "failed", "lost", "rejected"]


@dataclass(frozen=True)
class EditRecord(Value):
    """One line of the ledger: what was asked, by which method, with which result, and which rows it owns.

    status: "edited"; "already-right": nothing was to do; "failed": still wrong; "lost": right alone, wrong beside the other edits;
    "rejected": a request that could not be tried, for the reason in `message`; it owns nothing.
    rows: part name -> indices of its neurons (or ranks); `()` says that the edit shares the part as a whole (a `DenseDelta`,
    a batch's low-rank delta). `group`: edits of one group share parts and cannot be separated. hyperparameters: plain JSON
    data. created: ISO 8601. `request` is None once redacted; the record keeps a copy of the request it is given.
    """

    id: str
    method: str
    status: EditStatus
    request: EditRequest | None = None
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    group: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    created: str | None = None
    seconds: float | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        where = f"edit {checks.name(self.id, 'edit, id')!r}"
        checks.name(self.method, f"{where}, method")
        checks.one_of(self.status, STATUSES, f"{where}, status")
        checks.optional_name(self.group, f"{where}, group")
        if self.request is not None:
            if not isinstance(self.request, EditRequest):
                raise FormatError(
                    f"{where}, request: expected an EditRequest, found {type(self.request).__name__}; use as_requests"
                )
            if self.request.id != self.id:
                raise FormatError(
                    f"{where}, request: expected a request of the same id, found {self.request.id!r}; give both one id"
                )
            # All else in a request is frozen; a deep copy would take most of a load's time.
            versions = dict(self.request.versions)
            self._set(request=self.request.model_copy(update={"versions": versions}))
        hyperparameters = checks.frozen_mapping(self.hyperparameters, f"{where}, hyperparameters")
        for key in ("created", "message"):
            checks.optional_text(getattr(self, key), f"{where}, {key}")
        self._set(seed=checks.optional_integer(self.seed, f"{where}, seed"))
        self._set(seconds=checks.optional_number(self.seconds, f"{where}, seconds"))
        self._set(rows=checks.frozen_rows(self.rows, f"{where}, rows"))
        if self.status == "rejected" and (self.rows or self.group is not None):
            raise FormatError(
                f"{where}: expected a rejected edit to own no rows and belong to no group, found rows in {sorted(self.rows)} and "
                f"group {self.group!r}; correct the status"
            )
        self._set(hyperparameters=checks.frozen_json(hyperparameters, f"{where}, hyperparameters"))


@dataclass(frozen=True, eq=False, repr=False)
class PatchSet(Value):
    """An immutable set of patches for one base model.

    parts: name -> part; masks, gates: name -> what parts refer to; edits: the ledger; base: the identity of the base
    (`xpatch.patches.identity.BaseIdentity`), None only for hand-made sets. signatures: who vouches for this very content
    (`xpatch.sign`); a set made from this one by select, drop, + or redact has other content and none of them, and they are no
    part of the fingerprint. Iteration and `len` go over the ledger.
    Raises `FormatError` for parts that name a missing mask or gate or do not fit it, and for ledger rows that do not
    exist or are owned twice.
    """

    parts: Mapping[str, Part]
    edits: tuple[EditRecord, ...] = ()
    masks: Mapping[str, LanguageMask] = field(default_factory=dict)
    gates: Mapping[str, Gate] = field(default_factory=dict)
    base: BaseIdentity | None = None
    name: str | None = None
    signatures: tuple[Signature, ...] = ()

    def __post_init__(self) -> None:
        from xpatch.patches import ledger

        for kind in ("parts", "masks", "gates"):
            self._set(**{kind: checks.frozen_mapping(getattr(self, kind), f"patch set, {kind}")})
        self._set(edits=tuple(self.edits))
        ledger.check_set(self)
        self._set(signatures=carried(self.signatures, self) if self.signatures else ())

    def __len__(self) -> int:
        """The number of edits in the ledger."""
        return len(self.edits)

    def __bool__(self) -> bool:
        """True, as for any value: a set without a ledger can still patch."""
        return True

    def __iter__(self) -> Iterator[EditRecord]:
        return iter(self.edits)

    def __repr__(self) -> str:
        parts = ", ".join(f"{key}: {part.count or part.form} at {part.site}" for key, part in self.parts.items())
        return f"PatchSet(name={self.name!r}, edits={len(self)}, parts={{{parts}}}, {self.nbytes} bytes, {self.fingerprint[:12]})"

    def edit(self, id: str) -> EditRecord:
        """The record of one edit. Raises `MismatchError` when there is none."""
        from xpatch.patches import ledger

        return ledger.find(self, id)

    def select(self, ids: str | Iterable[str]) -> PatchSet:
        """Only these edits, in the set's order, and every row no edit owns; see `compose.select`.

        Raises `MismatchError` for an unknown id, `ConflictError` when a kept and a left edit cannot be separated.
        """
        from xpatch.patches import compose

        return compose.select(self, ids)

    def drop(self, ids: str | Iterable[str]) -> PatchSet:
        """All edits but these; as `select`."""
        from xpatch.patches import compose

        return compose.drop(self, ids)

    def __add__(self, other: PatchSet) -> PatchSet:
        """Both sets as one, the rows of `self` first; see `compose.add`. Raises `ConflictError` or `MismatchError`."""
        from xpatch.patches import compose

        return compose.add(self, other) if isinstance(other, PatchSet) else NotImplemented

    def redact(self, fields: str | Iterable[str] = "all") -> PatchSet:
        """The same patches with requests removed ("all") or only these of their fields; see `ledger.redact`."""
        from xpatch.patches import ledger

        return ledger.redact(self, fields)

    def check(self, model: Any, tokenizer: Any, texts: Any = None, **options: Any) -> ConflictReport:
        """Edits that contradict each other, within this set or with the sets `model` serves; false where nothing is wrong.

        texts and options: see `xpatch.watch.check`. The model is left as it is.
        """
        from xpatch.watch.conflicts import check

        return check(self, model, tokenizer, texts, **options)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor under the name it has in a patch folder: "neurons.0.keys", "masks.NAME.inner", "gates.NAME.keys"."""
        owners = {
            **self.parts,
            **{f"masks.{k}": v for k, v in self.masks.items()},
            **{f"gates.{k}": v for k, v in self.gates.items()},
        }
        return {f"{owner}.{key}": tensor for owner, value in owners.items() for key, tensor in value.tensors.items()}

    @property
    def languages(self) -> tuple[str, ...]:
        """Every language of the ledger's requests and of the masks, sorted."""
        spoken = {code for record in self.edits if record.request for code in record.request.versions}
        return tuple(sorted(spoken.union(*(mask.languages for mask in self.masks.values()))))

    @cached_property
    def expiring(self) -> tuple[EditRecord, ...]:
        """The edits whose request says when they end; see `xpatch.patches.expiry`."""
        return tuple(
            record for record in self.edits if record.request is not None and record.request.expires is not None
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the canonical config and the tensors' bytes; the same under another name or other times."""
        from xpatch.patches.config import fingerprint

        return fingerprint(self)
